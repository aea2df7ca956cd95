"""Engines as self-play sees them: the inference workers behind channels, and a scripted one.

Which job goes next is decided here, by (priority, job id), and as late as possible: a worker gets just a little more
than it has slots for, so that it never idles and a job of an old group still overtakes those of newer ones.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from azr_async.errors import EngineError
from azr_async.messages import Completion, GenerateJob, GenerationResults, WorkerReady
from azr_async.ports import Sender

Answers = AsyncIterator[WorkerReady | GenerationResults]


@dataclass(slots=True)
class WorkerTotals:
    """What a worker has reported so far."""

    busy_seconds: float = 0.0
    generated_tokens: int = 0


class RemoteEngines:
    """The `Engine` port over any number of inference workers.

    Workers announce themselves with `WorkerReady` among the answers; `connect` opens the channel that takes jobs to
    one. Run `run()` in the caller's TaskGroup for as long as `generate` is used, then `stop()`.
    """

    def __init__(
        self,
        answers: Answers,
        connect: Callable[[WorkerReady], Sender[GenerateJob]],
        *,
        expected_workers: Sequence[str],
        ready_seconds: float,
        job_seconds: float,
        oversubscription: float = 1.25,
    ) -> None:
        """Args:
        answers: what all workers send, a receiving end that is already entered.
        connect: opens the way to a worker.
        expected_workers: the names of those that were started, for the error when none comes up.
        ready_seconds: how long the first worker may take to come up.
        job_seconds: how long a worker may have a job before all of its samples are back.
        oversubscription: samples in flight at a worker, in multiples of its slots; above 1 so that it never idles.
        """
        self.totals: dict[str, WorkerTotals] = {}
        """By worker, for those that are ready."""
        self.dropped_completions = 0
        """Came for a job whose `generate` was left early."""
        self.unknown_completions = 0
        """Came for a job that no worker has, or twice."""
        self._answers, self._connect = answers, connect
        self._expected_workers, self._ready_seconds = expected_workers, ready_seconds
        self._job_seconds, self._oversubscription = job_seconds, oversubscription
        self._schedule = _Schedule()
        self._requests: dict[int, _Request] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        """The job's completions in the order in which they end. Leaving early drops the rest.

        Raises:
            EngineError: the worker was too slow, the engines have stopped, or the job cannot be told from another.
        """
        self._check(job)
        request = self._requests[job.job_id] = _Request(job)
        self._schedule.add(job)
        self._dispatch()
        try:
            for _ in range(job.samples):
                answer = await request.answers.get()
                if isinstance(answer, EngineError):
                    raise answer
                yield answer
        finally:
            del self._requests[job.job_id]

    async def run(self) -> None:
        """Move jobs and answers until `stop`, or until every worker has closed.

        Raises, in a group:
            EngineError: no worker came up in time, or all have closed while jobs were open.
            PeerVanished, ChannelClosed: a worker was lost.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks.append(tasks.create_task(self._route(tasks), name="engine answers"))
        finally:
            self._is_over = True
            for deadline in self._deadlines.values():
                deadline.cancel()
            for job_id, request in self._requests.items():
                reason = f"job {job_id} was open when the engines stopped. The first error of this run says why."
                request.answers.put_nowait(EngineError(reason))

    def stop(self) -> None:
        """End `run` and close the ways to the workers. Jobs that are still open end with EngineError."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()

    async def _route(self, tasks: asyncio.TaskGroup) -> None:
        """Take in what the workers send; the first of them must come up in time."""
        try:
            async with asyncio.timeout(self._ready_seconds) as patience:
                async for message in self._answers:
                    if isinstance(message, WorkerReady):
                        self._welcome(message, tasks)
                        patience.reschedule(None)
                    else:
                        self._take(message)
                    self._dispatch()
        except TimeoutError:
            names = ", ".join(self._expected_workers)
            raise EngineError(
                f"no inference worker was ready after {self._ready_seconds:g} s: {names} did not come up. "
                "Look at logs/<worker>.log, or raise wires.start_seconds if the model only loads slowly."
            ) from None
        if self._requests:
            raise EngineError(
                f"every inference worker has closed, but {len(self._requests)} jobs are open. "
                f"Look at the logs of {', '.join(self._schedule.workers)}."
            )
        self.stop()

    async def _feed(self, worker: "_Worker", ready: WorkerReady) -> None:
        """Send what was dispatched to one worker."""
        async with self._connect(ready) as jobs:
            while True:
                await jobs.send(await worker.outbox.get())

    def _welcome(self, ready: WorkerReady, tasks: asyncio.TaskGroup) -> None:
        if ready.worker in self._schedule.workers:
            raise EngineError(f"two inference workers call themselves {ready.worker}. Give each a name of its own.")
        worker = _Worker(ready.worker, ready.slots * self._oversubscription)
        self._schedule.workers[ready.worker] = worker
        self.totals[ready.worker] = WorkerTotals()
        self._tasks.append(tasks.create_task(self._feed(worker, ready), name=f"jobs for {ready.worker}"))

    def _dispatch(self) -> None:
        while lease := self._schedule.next_lease(self._requests):
            lease.worker.outbox.put_nowait(lease.job)
            timer = asyncio.get_running_loop().call_later(self._job_seconds, self._expire, lease)
            self._deadlines[lease.job.job_id] = timer

    def _expire(self, lease: "_Lease") -> None:
        """The first job that is too late speaks for all that its worker has: they end with the same words."""
        worker, job_id = lease.worker.name, lease.job.job_id
        if job_id in self._requests:
            open_ids = [held for held in self._schedule.held_by(lease.worker) if held in self._requests]
            reason = (
                f"inference worker {worker} is too slow: the oldest of its {len(open_ids)} open jobs has been there "
                f"for {self._job_seconds:g} s, and {len(lease.missing)} samples of it are missing. "
                f"Look at logs/{worker}.log, or raise wires.step_seconds."
            )
            for open_id in open_ids:
                self._requests[open_id].answers.put_nowait(EngineError(reason))

    def _take(self, results: GenerationResults) -> None:
        self.totals[results.worker] = WorkerTotals(results.busy_seconds, results.generated_tokens)
        for completion in results.completions:
            lease = self._schedule.settle(completion)
            if lease is not None and not lease.missing:
                self._deadlines.pop(completion.job_id).cancel()
            if lease is None:
                self.unknown_completions += 1
            elif completion.job_id in self._requests:
                self._requests[completion.job_id].answers.put_nowait(completion)
            else:
                self.dropped_completions += 1

    def _check(self, job: GenerateJob) -> None:
        if self._is_over:
            raise EngineError(f"job {job.job_id} came after the engines had stopped. The first error says why.")
        if job.job_id in self._requests or job.job_id in self._schedule.leases:
            raise EngineError(f"job {job.job_id} is under way already. Count job ids up.")
        if job.samples < 1:
            raise EngineError(f"job {job.job_id} asks for {job.samples} samples. Ask for at least one.")


class ScriptedEngine:
    """The `Engine` port without a model: a rule writes the answers. For tests, benchmarks and simulation.

    A token is a byte of the text's UTF-8, and `END_OF_SEQUENCE` closes every answer that was not cut.
    """

    END_OF_SEQUENCE = 256

    def __init__(self, answer: Callable[[GenerateJob, int], str], *, version: Callable[[], int] = lambda: 0) -> None:
        """Args:
        answer: the text of a job's sample number n.
        version: of the weights that sample; asked once for each completion.
        """
        self._answer, self._version = answer, version

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        """The job's completions in the order of their index."""
        for index in range(job.samples):
            await asyncio.sleep(0)  # as with a real engine, others get their turn
            yield self._completion(job, index)

    def _completion(self, job: GenerateJob, index: int) -> Completion:
        text = self._answer(job, index)
        tokens = [*text.encode(), self.END_OF_SEQUENCE]
        is_cut = len(tokens) > job.max_tokens
        token_ids = np.array(tokens[: job.max_tokens], np.int32)
        return Completion(
            job_id=job.job_id,
            index=index,
            finish="length" if is_cut else "stop",
            text=bytes(tokens[: job.max_tokens]).decode(errors="ignore") if is_cut else text,
            prompt_ids=np.array(list(job.prompt.text.encode()), np.int32),
            token_ids=token_ids,
            behavior_logp=(-(1 + token_ids % 8) / 8).astype(np.float32),
            token_version=np.full(len(token_ids), self._version(), np.int32),
        )


@dataclass(slots=True)
class _Request:
    """A job that somebody waits for. An error among its answers ends it."""

    job: GenerateJob
    answers: asyncio.Queue[Completion | EngineError] = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class _Worker:
    """A worker that is ready."""

    name: str
    room: float
    """Samples it may still get. The job that makes this negative is its last one for now."""
    outbox: asyncio.Queue[GenerateJob] = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class _Lease:
    """A job that a worker has."""

    worker: _Worker
    job: GenerateJob
    missing: set[int]
    """Indices of the samples that have not come back."""


class _Schedule:
    """Which worker gets which job next, and what it still owes. Bookkeeping only."""

    def __init__(self) -> None:
        self.workers: dict[str, _Worker] = {}
        self.leases: dict[int, _Lease] = {}
        self._waiting: list[tuple[int, int]] = []

    def add(self, job: GenerateJob) -> None:
        heapq.heappush(self._waiting, (job.priority, job.job_id))

    def next_lease(self, requests: Mapping[int, _Request]) -> _Lease | None:
        """The most urgent job that is still wanted, for the worker with the most room; None: no job or no room."""
        while self._waiting and self.workers:
            worker = max(self.workers.values(), key=lambda worker: worker.room)
            if worker.room <= 0:
                return None
            _, job_id = heapq.heappop(self._waiting)
            if job_id in requests:
                job = requests[job_id].job
                lease = self.leases[job_id] = _Lease(worker, job, set(range(job.samples)))
                worker.room -= job.samples
                return lease
        return None

    def held_by(self, worker: _Worker) -> list[int]:
        """Ids of the jobs of which a worker still owes samples."""
        return [job_id for job_id, lease in self.leases.items() if lease.worker is worker]

    def settle(self, completion: Completion) -> _Lease | None:
        """Take one sample off what its worker owes; None when nobody owes it."""
        lease = self.leases.get(completion.job_id)
        if lease is None or completion.index not in lease.missing:
            return None
        lease.missing.remove(completion.index)
        lease.worker.room += 1
        if not lease.missing:
            del self.leases[completion.job_id]
        return lease
