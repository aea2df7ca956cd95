"""Jobs taken apart into sequences, and the order in which those get a row."""

import heapq
import itertools

import numpy as np
from numpy.typing import NDArray

from azr_async.adapters.engines.embedded.rows import Sequence
from azr_async.algorithm.sampling import stream_keys
from azr_async.messages import GenerateJob


class Waiting:
    """Sequences without a row; lower (priority, job_id) goes first, then first come."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Sequence]] = []
        self._tickets = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, job: GenerateJob, prompt_ids: NDArray[np.int32]) -> None:
        """Queue the wanted samples of a job. They share the prompt's array, by which `take` knows them again."""
        for index, key in zip(job.wanted, stream_keys(job.seed, np.array(job.wanted)), strict=True):
            sequence = Sequence(
                priority=job.priority,
                job_id=job.job_id,
                index=index,
                prompt=job.prompt,
                prompt_ids=prompt_ids,
                max_tokens=job.max_tokens,
                temperature=job.temperature,
                top_p=job.top_p,
                key=key,
            )
            self.put(sequence)

    def put(self, sequence: Sequence) -> None:
        """Queue one sequence."""
        heapq.heappush(self._heap, (sequence.priority, sequence.job_id, next(self._tickets), sequence))

    def drop(self, job_id: int) -> None:
        """Forget the sequences of a job."""
        self._heap = [entry for entry in self._heap if entry[1] != job_id]
        heapq.heapify(self._heap)

    def take(self, most: int) -> list[list[Sequence]]:
        """The up to `most` sequences that go first, grouped by prompt."""
        groups: dict[int, list[Sequence]] = {}
        for _ in range(min(most, len(self._heap))):
            sequence = heapq.heappop(self._heap)[-1]
            groups.setdefault(id(sequence.prompt_ids), []).append(sequence)
        return list(groups.values())
