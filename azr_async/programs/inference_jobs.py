"""The jobs of the self-play that an inference worker has now. What the engine still makes of those of one that is gone
must not pass for the jobs of the next, which counts from where the first one did."""

from dataclasses import replace
from typing import Final

from azr_async.messages import CancelJob, GenerateJob, GenerationResults

SPAN: Final = 2**48
"""More jobs than a self-play asks for; its numbers go up and down from 0."""


class Jobs:
    """Tells the engine's jobs apart by who asked for them."""

    def __init__(self) -> None:
        self._missing: dict[int, int] = {}
        """Samples by open job."""
        self._first = 0
        """What is job 0 for self-play is this one for the engine."""
        nothing = GenerationResults(worker="", completions=(), busy_seconds=0.0, generated_tokens=0)
        self._newest = self._before = nothing
        """The last totals, and those when self-play came."""

    def order(self, order: GenerateJob | CancelJob) -> GenerateJob | CancelJob:
        """The same for the engine."""
        if isinstance(order, GenerateJob):
            self._missing[order.job_id] = len(order.wanted)
        else:
            self._missing.pop(order.job_id, None)
        return replace(order, job_id=order.job_id + self._first)

    def results(self, results: GenerationResults) -> GenerationResults:
        """The same for self-play: what it has asked for, and totals since it came."""
        self._newest, before = results, self._before
        own = [
            replace(completion, job_id=job_id)
            for completion in results.completions
            if abs(job_id := completion.job_id - self._first) < SPAN // 2
        ]
        for completion in own:
            self._count(completion.job_id)
        return replace(
            results,
            completions=tuple(own),
            busy_seconds=results.busy_seconds - before.busy_seconds,
            generated_tokens=results.generated_tokens - before.generated_tokens,
            numbers={name: number - before.numbers.get(name, 0.0) for name, number in results.numbers.items()},
        )

    def forget(self) -> list[CancelJob]:
        """Self-play is gone. Returns what the engine is to leave."""
        orders = [CancelJob(job_id=job_id + self._first) for job_id in self._missing]
        self._missing.clear()
        self._first += SPAN
        self._before = self._newest
        return orders

    def _count(self, job_id: int) -> None:
        if job_id in self._missing:  # else nobody waits for it any more
            self._missing[job_id] -= 1
            if not self._missing[job_id]:
                del self._missing[job_id]
