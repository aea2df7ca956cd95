"""The inference workers behind channels.

Which job goes next is decided here, by (priority, job id), and as late as possible: a worker gets just a little more
than it has slots for, so that it never idles and a job of an old group still overtakes those of newer ones. Workers
come and go; who owes which samples is in `algorithm/leases.py`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from azr_async.adapters.engine_client.links import Connect, Links, WorkerTotals
from azr_async.algorithm.leases import Lease, Leases
from azr_async.errors import EngineError, PeerVanished
from azr_async.messages import CancelJob, Completion, GenerateJob, GenerationResults, WorkerReady

Answers = AsyncIterator[WorkerReady | GenerationResults]

log = logging.getLogger(__name__)


class RemoteEngines:
    """The `Engine` port over any number of inference workers, any of which may be lost and come back.

    Workers announce themselves with `WorkerReady` among the answers; `connect` opens the channel that takes jobs to
    one. A worker gets jobs while the newest `installed` names it. Run `run()` in the caller's TaskGroup for as long
    as `generate` is used, then `stop()`.
    """

    def __init__(
        self,
        answers: Answers,
        connect: Connect,
        *,
        expected_workers: Sequence[str],
        ready_seconds: float,
        job_seconds: float,
        oversubscription: float = 1.25,
    ) -> None:
        """Args:
        answers: what all workers send, a receiving end that is already entered.
        connect: opens the way to a worker.
        expected_workers: the names of those that were started, for the error when none is there.
        ready_seconds: how long there may be no worker: until the first is ready, and after the last was lost.
        job_seconds: how long a worker may have a job before all of its samples are back.
        oversubscription: samples in flight at a worker, in multiples of its slots; above 1 so that it never idles.
        """
        self._answers = answers
        self._job_seconds, self._oversubscription = job_seconds, oversubscription
        self._leases = Leases()
        self._links = Links(
            connect, expected_workers=expected_workers, ready_seconds=ready_seconds, on_lost=self._on_lost
        )
        self._requests: dict[int, asyncio.Queue[Completion | EngineError]] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    @property
    def totals(self) -> Mapping[str, WorkerTotals]:
        """By worker, for those that have been ready."""
        return self._links.totals

    def numbers(self) -> dict[str, float]:
        """Counters, for the metrics; those that workers report, added up over them."""
        reported = Counter[str]()
        for totals in self.totals.values():
            reported.update(totals.numbers)
        return reported | {
            "workers": float(len(self._links.open)),
            "lost_workers": float(self._links.lost),
            "reissued": float(self._leases.reissued),
            "late": float(self._leases.late),
            "unknown": float(self._leases.unknown),
        }

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        """The job's completions in the order in which they end. Leaving early drops the rest.

        Raises:
            EngineError: its worker was too slow and there is no other, the engines have stopped, or the job cannot be
                told from another.
        """
        self._check(job)
        answers = self._requests[job.job_id] = asyncio.Queue()
        self._leases.add(job)
        self._dispatch()
        try:
            for _ in job.wanted:
                answer = await answers.get()
                if isinstance(answer, EngineError):
                    raise answer
                yield answer
        finally:
            del self._requests[job.job_id]
            self._cancel(job.job_id)

    def installed(self, workers: Mapping[str, int]) -> None:
        """These workers, by name and incarnation, have the newest weights: they get jobs, others none.

        What others owe is made again, for nobody knows how old the weights are that they sample with.
        """
        self._links.newest = workers
        for name in self._links.open:
            if not self._links.is_current(name):
                self._take_back(name, "it does not have the newest weights")
        self._dispatch()

    async def run(self) -> None:
        """Move jobs and answers until `stop`, or until every worker has closed for good.

        Raises, in a group:
            EngineError: no worker came up, or back, in time; or all have closed while jobs were open.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks.append(tasks.create_task(self._route(tasks), name="engine answers"))
        finally:
            self._is_over = True
            for deadline in self._deadlines.values():
                deadline.cancel()
            for job_id, answers in self._requests.items():
                reason = f"job {job_id} was open when the engines stopped. The first error of this run says why."
                answers.put_nowait(EngineError(reason))

    def stop(self) -> None:
        """End `run` and close the ways to the workers. Jobs that are still open end with EngineError."""
        self._is_over = True
        self._links.close()
        for task in self._tasks:
            task.cancel()

    async def _route(self, tasks: asyncio.TaskGroup) -> None:
        """Take in what the workers send. One that falls silent is noticed by its link; the others are heard on."""
        try:
            async with self._links.patience():
                while (message := await self._next_answer()) is not None:
                    if isinstance(message, WorkerReady):
                        self._links.welcome(message, tasks)
                        self._leases.welcome(message.worker, message.slots * self._oversubscription)
                    else:
                        self._take(message)
                    self._dispatch()
        except TimeoutError:
            raise EngineError(self._links.nobody_there()) from None
        if self._requests:
            raise EngineError(
                f"every inference worker has closed, but {len(self._requests)} jobs are open. "
                f"Look at the logs of {', '.join(self.totals)}."
            )
        self.stop()

    async def _next_answer(self) -> WorkerReady | GenerationResults | None:
        while True:
            try:
                return await anext(self._answers, None)
            except PeerVanished as silence:
                log.warning("%s", silence)

    def _take(self, results: GenerationResults) -> None:
        self._links.hear(results)
        for completion in results.completions:
            if self._leases.settle(results.worker, completion.job_id, completion.index):
                if not self._leases.is_open(completion.job_id):
                    self._deadlines.pop(completion.job_id).cancel()
                self._requests[completion.job_id].put_nowait(completion)

    def _dispatch(self) -> None:
        while lease := self._leases.next(self._links.takes_jobs):
            job = lease.job
            is_whole = len(lease.missing) == len(job.wanted)
            self._links.send(lease.worker, job if is_whole else replace(job, indices=tuple(sorted(lease.missing))))
            timer = asyncio.get_running_loop().call_later(self._job_seconds, self._expire, lease)
            self._deadlines[job.job_id] = timer

    def _expire(self, late: Lease) -> None:
        """The first job that is too late speaks for all that its worker has: the others make them.

        If there are no others, they end, all with the same words.
        """
        name = late.worker
        held = self._leases.held_by(name)
        reason = (
            f"inference worker {name} is too slow: the oldest of its {len(held)} open jobs has been there "
            f"for {self._job_seconds:g} s, and {len(late.missing)} samples of it are missing. "
            f"Look at logs/{name}.log, or raise wires.step_seconds."
        )
        if any(self._links.takes_jobs(other) for other in self._links.open if other != name):
            self._links.open[name].is_slow = True
            self._take_back(name, reason)
            self._dispatch()
        else:
            for job_id in held:
                self._requests[job_id].put_nowait(EngineError(reason))

    def _on_lost(self, name: str) -> None:
        for job_id in self._leases.lose(name):
            self._deadlines.pop(job_id).cancel()
        self._dispatch()

    def _take_back(self, name: str, why: str) -> None:
        jobs = self._leases.take_back(name)
        for job_id in jobs:
            self._deadlines.pop(job_id).cancel()
            self._links.send(name, CancelJob(job_id=job_id))
        if jobs:
            log.warning("%d jobs of %s are given to others: %s", len(jobs), name, why)

    def _cancel(self, job_id: int) -> None:
        """Nobody waits for a job any more: the worker that has it may drop it."""
        name = self._leases.cancel(job_id)
        if name:
            self._deadlines.pop(job_id).cancel()
            self._links.send(name, CancelJob(job_id=job_id))
            self._dispatch()

    def _check(self, job: GenerateJob) -> None:
        if self._is_over:
            raise EngineError(f"job {job.job_id} came after the engines had stopped. The first error says why.")
        if job.job_id in self._requests:
            raise EngineError(f"job {job.job_id} is under way already. Count job ids up.")
        if job.samples < 1:
            raise EngineError(f"job {job.job_id} asks for {job.samples} samples. Ask for at least one.")
