"""Who makes which samples: bookkeeping of the jobs that somebody waits for, and of the workers that have them.

Every missing sample of an open job either waits or is owed by exactly one worker; nothing else is ever delivered. So
however workers come and go, each sample is delivered once: what a lost worker owed waits again, under the index and
therefore with the random draws that it had, and what that worker sends all the same is told apart and counted.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from azr_async.messages import GenerateJob

REMEMBERED: Final = 10_000
"""More samples than are made at a time: what was taken from a worker comes soon, or never."""


@dataclass(slots=True)
class Lease:
    """An open job, the samples of it that are missing, and who is to make them."""

    job: GenerateJob
    missing: set[int]
    worker: str = ""
    """Empty: it waits for one."""


class Leases:
    """Which worker gets which samples next, and what it owes."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        """So many of the samples that were last taken from workers are told apart when they come all the same."""
        self.room: dict[str, float] = {}
        """By worker: samples that it may still get. The job that makes this negative is its last one for now."""
        self.late = 0
        """Samples that came from a worker from which they had been taken: too slow, lost, or nobody waits for them."""
        self.unknown = 0
        """Samples that came although the worker never had them, or twice, or that were taken from it long ago."""
        self.reissued = 0
        """Samples that were taken from a worker to be made by another one."""
        self._open: dict[int, Lease] = {}
        self._waiting: list[tuple[int, int]] = []
        self._remembered = remembered
        self._revoked: dict[tuple[str, int, int], None] = {}  # worker, job, index; the oldest first

    def is_open(self, job_id: int) -> bool:
        """Is a sample of this job still missing?"""
        return job_id in self._open

    def add(self, job: GenerateJob) -> None:
        """Somebody waits for this job."""
        self._open[job.job_id] = Lease(job, set(job.wanted))
        heapq.heappush(self._waiting, (job.priority, job.job_id))

    def welcome(self, name: str, room: float) -> None:
        """A worker is there, and has nothing yet."""
        self.room[name] = room
        self._revoked = {sample: None for sample in self._revoked if sample[0] != name}

    def lose(self, name: str) -> list[int]:
        """A worker is gone. Returns the jobs of which it owed samples; they wait again."""
        jobs = self.take_back(name)
        del self.room[name]
        return jobs

    def take_back(self, name: str) -> list[int]:
        """Take everything from a worker that it owes. Returns the jobs; they wait again."""
        jobs = self.held_by(name)
        for job_id in jobs:
            lease = self._open[job_id]
            self._revoke(lease)
            self.reissued += len(lease.missing)
            heapq.heappush(self._waiting, (lease.job.priority, job_id))
        return jobs

    def cancel(self, job_id: int) -> str:
        """Nobody waits for a job any more. Returns the worker that has it, if one has."""
        lease = self._open.pop(job_id, None)
        if lease is None or not lease.worker:
            return ""
        name = lease.worker
        self._revoke(lease)
        return name

    def next(self, takes_jobs: Callable[[str], bool]) -> Lease | None:
        """Give the most urgent job that waits to the worker with the most room; None: no job or no room."""
        while self._waiting:
            lease = self._open.get(self._waiting[0][1])
            if lease is None or lease.worker:  # cancelled while it waited, or noted down twice
                heapq.heappop(self._waiting)
                continue
            able = [name for name, room in self.room.items() if room > 0 and takes_jobs(name)]
            if not able:
                return None
            heapq.heappop(self._waiting)
            lease.worker = max(able, key=self.room.__getitem__)
            self.room[lease.worker] -= len(lease.missing)
            return lease
        return None

    def settle(self, name: str, job_id: int, index: int) -> bool:
        """A worker has sent a sample. True: it owed it, and it is to be delivered; else it is counted."""
        lease = self._open.get(job_id)
        if lease is None or lease.worker != name or index not in lease.missing:
            self._count_refused((name, job_id, index))
            return False
        lease.missing.remove(index)
        self.room[name] += 1
        if not lease.missing:
            del self._open[job_id]
        return True

    def held_by(self, name: str) -> list[int]:
        """Jobs of which a worker owes samples."""
        return [job_id for job_id, lease in self._open.items() if lease.worker == name]

    def _revoke(self, lease: Lease) -> None:
        self.room[lease.worker] += len(lease.missing)
        for index in sorted(lease.missing):
            sample = (lease.worker, lease.job.job_id, index)
            self._revoked.pop(sample, None)
            self._revoked[sample] = None
        while len(self._revoked) > self._remembered:
            del self._revoked[next(iter(self._revoked))]
        lease.worker = ""

    def _count_refused(self, sample: tuple[str, int, int]) -> None:
        if sample in self._revoked:
            del self._revoked[sample]
            self.late += 1
        else:
            self.unknown += 1
