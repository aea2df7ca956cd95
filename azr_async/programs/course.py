"""The course of self-play from version to version: library, flow, ledger and journal move on together."""

from collections.abc import AsyncIterator

from azr_async.algorithm.ledger import Ledger, SampleId
from azr_async.algorithm.staleness import Flow
from azr_async.config import Config
from azr_async.messages import Completion, GenerateJob, SelfPlayState
from azr_async.ports import Engine
from azr_async.programs.parts import Parts
from azr_async.programs.standing import Standing, written


class Course:
    """What happens when weights are installed, and what can be told of it for a checkpoint."""

    def __init__(self, parts: Parts) -> None:
        """The ledger becomes that of the weights with which the run goes on; groups that are not in them start anew."""
        version = parts.start_version
        parts.journal.roll_back(version)
        left, newest = parts.journal.left_groups(version), parts.journal.newest_groups()
        free = max(newest.values(), default=-1) + 1
        self.flow = _flow(parts.config, parts.standing.first_group if parts.standing else free)
        self.flow.installed(version)
        self.ledger = Ledger(newest=newest)
        self._parts = parts
        self._newest_task = 0
        for group in left:
            self.ledger.lease(group, is_reissue=True)
        for group in self.flow.reissue(left):
            self.ledger.drop_rest(group.group_id, "there is no room for it any more", version=version)

    def begin(self) -> None:
        """The library is filled: from now on it changes with the versions."""
        self._settle(self.flow.version)

    def installed(self, version: int) -> None:
        """Every engine samples with `version` now. Nothing may be admitted in between: this does not wait."""
        is_newer = version > self.flow.version  # else it is told once more, for a worker that has come later
        self.flow.installed(version)
        self.ledger.installed(version)
        if is_newer:
            self._settle(version)

    async def state(self) -> SelfPlayState:
        """How a run can go on with the installed weights; by then the journal has all that this refers to."""
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
        parts.journal.record(self.ledger.take())
        await parts.journal.flush()
        return SelfPlayState(version=version, state=written(standing))

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


def _flow(config: Config, first_group: int) -> Flow:
    return Flow(
        max_lag=config.flow.max_lag,
        propose_samples=config.flow.propose_samples,
        solve_samples=config.flow.solve_samples,
        trained_attempts=config.solve.trained_attempts,
        tasks=config.flow.tasks,
        late=config.flow.late,
        first_group=first_group,
    )
