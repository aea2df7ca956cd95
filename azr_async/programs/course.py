"""The course of self-play from version to version: library, flow, ledger and journal move on together."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Self

from azr_async.algorithm.ledger import Ledger, SampleId
from azr_async.algorithm.staleness import Flow
from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import Cell, Completion, EvaluationResult, GenerateJob, RolloutBatch, SelfPlayState
from azr_async.ports import Engine, Sender
from azr_async.programs.parts import Parts
from azr_async.programs.standing import Standing, written

Reply = RolloutBatch | EvaluationResult | SelfPlayState


class Course:
    """What happens when weights are installed, and what can be told of it for a checkpoint."""

    def __init__(self, parts: Parts) -> None:
        """The ledger becomes that of the weights with which the run goes on; groups that are not in them start anew."""
        version, handover = parts.start_version, parts.handover
        if handover is not None and handover.has_begun:
            parts.journal.take_over(version, handover.held)
        else:
            parts.journal.roll_back(version)
        left, newest = parts.journal.left_groups(version), parts.journal.newest_groups()
        free = max(newest.values(), default=-1) + 1
        self.flow = _flow(parts, parts.standing.first_group if parts.standing else free)
        self.flow.installed(version)
        self.ledger = Ledger(newest=newest)
        self._parts = parts
        self._newest_task = 0
        self._take_held()
        for group in left:
            self.ledger.lease(group, is_reissue=True)
        for group in self.flow.reissue(left):
            self.ledger.drop_rest(group.group_id, "there is no room for it any more", version=version)

    def begin(self) -> None:
        """The library is filled: from now on it changes with the versions."""
        self._settle(self.flow.version)

    def installed(self, version: int, *, max_lag: int | None = None) -> None:
        """Every engine samples with `version` now. Nothing may be admitted in between: this does not wait.

        `max_lag`, if the learner says it, is the staleness bound of what is admitted from now on.
        """
        if max_lag is not None:
            self.flow.max_lag = max_lag
        is_newer = version > self.flow.version  # else it is told once more, for a worker that has come later
        self.flow.installed(version)
        self.ledger.installed(version)
        if is_newer:
            self._settle(version)

    async def state(self, kept_step: int = 0) -> SelfPlayState:
        """How a run can go on with the installed weights; by then the journal has all that this refers to.

        No run goes on from weights before `kept_step`, the oldest checkpoint's.
        """
        parts, version = self._parts, self.flow.version
        standing = Standing(
            version=version,
            run_seed=parts.config.run.seed,
            seed=parts.seed,
            first_group=self.flow.first_group,
            next_round=next(parts.group_ids),
            newest_task=self._newest_task,
            tasks=parts.library.uses(),
        )
        await self.write_down()
        parts.journal.sum_up(min(kept_step, version - parts.config.journal.keep_steps))
        return SelfPlayState(version=version, state=written(standing))

    async def write_down(self) -> None:
        """Return when all that the ledger says is on the disk."""
        self._parts.journal.record(self.ledger.take())
        await self._parts.journal.flush()

    def _take_held(self) -> None:
        """Batches that the learner has from an earlier process have slots here, and are trained in due course."""
        cells: defaultdict[int, Counter[Cell]] = defaultdict(Counter)
        admitted = self._parts.journal.admitted()
        for sample, entry, task in admitted:
            assert entry.step is not None
            cells[entry.step - 1][sample.role, task] += 1
        for version, sizes in cells.items():
            self.flow.took(version, sizes)
        self.ledger.hold({sample: entry for sample, entry, _ in admitted})

    def _settle(self, version: int) -> None:
        parts = self._parts
        parts.journal.note_use(parts.library.settle(version))
        parts.journal.record(self.ledger.take())
        self._newest_task = parts.journal.newest_task


class NotingEngine:
    """Fulfils ports.Engine: another one, whose completions are entered in the ledger."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self._engine, self._ledger = engine, ledger

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        """The other engine's completions."""
        async for completion in self._engine.generate(job):
            group_id, is_attempt = divmod(job.job_id, 2)
            sample = SampleId(group_id, "solve" if is_attempt else "propose", completion.index)
            if sample in self._ledger:  # else an attempt that is only judged, not trained on
                self._ledger.returned(sample)
            yield completion


class FiledReplies:
    """Fulfils ports.Sender: what self-play says to the learner, with its number. A batch goes once the journal has it.

    So whoever takes over knows of all that the learner has, and that it is not to be trained again.
    """

    def __init__(self, replies: Sender[Reply], course: Course, *, incarnation: int) -> None:
        self._replies, self._course, self._incarnation = replies, course, incarnation

    async def send(self, message: Reply) -> None:
        """Deliver in order, as the other end does."""
        if isinstance(message, RolloutBatch):
            await self._course.write_down()
        await self._replies.send(replace(message, incarnation=self._incarnation))

    async def ended(self) -> ChannelClosed | PeerVanished:
        """Wait until nothing can be sent any more."""
        return await self._replies.ended()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """The other end is closed by who has opened it."""


def _flow(parts: Parts, first_group: int) -> Flow:
    config = parts.config
    return Flow(
        max_lag=config.flow.lag_limit if parts.max_lag is None else parts.max_lag,
        propose_samples=config.flow.propose_samples,
        solve_samples=config.flow.solve_samples,
        trained_attempts=config.solve.trained_attempts,
        tasks=config.flow.tasks,
        late=config.flow.late,
        first_group=first_group,
    )
