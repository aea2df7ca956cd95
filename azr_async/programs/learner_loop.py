"""Rank 0 of the learner: the order in which batches, updates, pushes, evaluations, lines and checkpoints follow."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate import Accelerator

from azr_async.adapters import checkpoints
from azr_async.adapters.trainer import Crew, StepReport, Trainer
from azr_async.algorithm.lag_control import Measurement
from azr_async.config import Config
from azr_async.messages import (
    BatchRequest,
    EvaluationRequest,
    EvaluationResult,
    RolloutBatch,
    SelfPlayState,
    StateRequest,
    WeightsReady,
)
from azr_async.programs.learner_lag import LagBound
from azr_async.programs.learner_metrics import Books, Push, Record, empty_record, step_record
from azr_async.programs.learner_saving import Saver
from azr_async.programs.learner_weights import Publisher
from azr_async.programs.learner_wires import FromSelfPlay, Wires
from azr_async.programs.torch_thread import TorchThread
from azr_async.programs.wiring import Reporter

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a rank trains, and where it starts."""

    model: Any
    tokenizer: Any
    trainer: Trainer
    crew: Crew
    """The trainers of all ranks; on rank 0 only."""
    accelerator: Accelerator
    is_resumed: bool
    wall_seconds: float
    """Training time before this process started."""
    self_play: str = ""
    """How self-play goes on; empty where nobody has written that down."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the learner has written down of itself."""


class Leader:
    """Trains up to `run.steps`, or until a stop is requested.

    The next batch is asked for before a step and comes while it is computed. An evaluation runs during the next
    step, and the next push waits for it, so that it is an evaluation of exactly one version. A checkpoint waits for
    it too: a run that goes on from there has the lines of all steps before.
    """

    def __init__(
        self,
        loaded: Loaded,
        config: Config,
        *,
        torch: TorchThread,
        wires: Wires,
        publisher: Publisher,
        books: Books,
        reporter: Reporter,
        saver: Saver,
    ) -> None:
        self._loaded, self._trainer, self._config = loaded, loaded.crew, config
        self._torch, self._wires, self._publisher = torch, wires, publisher
        self._books, self._reporter, self._saver = books, reporter, saver
        self._first_version = self._saved_step = self._trainer.version
        self._started = self._last_step_end = 0.0
        self._unwritten: Record | None = None  # the line of the installed weights, while they are evaluated
        self._lag = LagBound(config.flow, loaded.numbers)
        self._cpu_seconds = time.process_time()
        self._was_evaluated = False  # since the line before

    async def run(self) -> None:
        """The whole run; a checkpoint of the newest weights is its last deed."""
        if self._loaded.self_play:
            await self._wires.requests.send(SelfPlayState(version=self._trainer.version, state=self._loaded.self_play))
        push = await self._publish()
        self._last_step_end = time.monotonic()
        self._started = self._last_step_end - self._loaded.wall_seconds
        if not self._loaded.is_resumed and self._is_evaluated(0):
            await self._file(empty_record(0, self._config, wall_seconds=0.0, push=push))
        if self._goes_on():
            await self._wires.requests.send(BatchRequest(version=self._trainer.version))
        while self._goes_on() and (batch := await self._next_batch()) is not None:
            await self._save_beginning()
            report = await self._train(batch)
            await self._file_evaluated()
            if report.version == 1:
                await self._saver.done()  # from now on there is something to go on from
            push = await self._publish()
            await self._file(self._record(batch, report, push))
            if self._config.checkpoint.every_steps and report.version % self._config.checkpoint.every_steps == 0:
                await self._file_evaluated()
                await self._save()
        await self._file_evaluated()
        await self._save()

    async def _save_beginning(self) -> None:
        """A new run's first checkpoint holds the weights that it began with, and the tasks that they have found."""
        if not self._loaded.is_resumed and self._trainer.version == 0 and self._config.checkpoint.every_steps:
            await self._file_evaluated()
            await self._begin_checkpoint()

    def _goes_on(self) -> bool:
        return self._trainer.version < self._config.run.steps and not self._reporter.stop_requested.is_set()

    def _is_evaluated(self, step: int) -> bool:
        evaluation = self._config.evaluation
        is_due = evaluation.every_steps > 0 and step % evaluation.every_steps == 0
        return evaluation.suite != "none" and (is_due or step in (0, self._config.run.steps))

    def _report(self, phase: str) -> None:
        self._reporter.report(phase, self._trainer.version, self._config.run.steps)

    async def _publish(self) -> Push:
        self._report("pushing weights")
        push = await self._publisher.push(self._trainer.version)
        version, workers = self._trainer.version, self._publisher.installed
        max_lag = self._lag.announced(version)
        await self._wires.requests.send(WeightsReady(version=version, workers=workers, max_lag=max_lag))
        return push

    async def _next_batch(self) -> RolloutBatch | None:
        self._report("waiting for samples")
        return await self._made_with_newest(RolloutBatch)

    async def _made_with_newest(self, kind: type[FromSelfPlay]) -> FromSelfPlay | None:
        """What self-play makes with the newest weights; None when a stop is requested.

        A worker that comes in the meantime gets them at once: self-play may have nobody else to make it.
        """
        version, inbox = self._trainer.version, self._wires.inbox
        while True:
            made = await inbox.next(
                kind,
                version=version,
                deadline_seconds=self._deadline_seconds(version),
                unless=lambda: self._publisher.has_newcomers,
            )
            if made is not None or inbox.is_stopping:
                return made
            await self._publish()

    def _deadline_seconds(self, version: int) -> float:
        """For what self-play makes with weights of `version`; with the first ones it fills its library before."""
        wires = self._config.wires
        return wires.step_seconds + (wires.start_seconds if version == self._first_version else 0.0)

    async def _train(self, batch: RolloutBatch) -> StepReport:
        self._report("training")
        if self._trainer.version + 1 < self._config.run.steps:
            await self._wires.requests.send(BatchRequest(version=self._trainer.version + 1))
        return await self._torch.run(
            partial(self._trainer.train, batch),
            what=f"learner-0's training step {self._trainer.version + 1}",
            deadline_seconds=self._config.learner.step_seconds,
        )

    def _record(self, batch: RolloutBatch, report: StepReport, push: Push) -> Record:
        now, before = time.monotonic(), self._last_step_end
        self._last_step_end = now
        busy_share = report.seconds / (now - before)
        if not self._was_evaluated:  # else the step tells of the evaluation, not of the bound
            tokens = float(report.trained_tokens)
            self._lag.measured(Measurement(trained_tokens=tokens, ess=report.ess, seconds=now - before))
        self._was_evaluated = False
        record = step_record(batch, report, push, self._config, wall_seconds=now - self._started, busy_share=busy_share)
        record["lag"] |= self._lag.metrics(batch.version)
        cpu_seconds, self._cpu_seconds = time.process_time() - self._cpu_seconds, time.process_time()
        record.setdefault("cpu", {})["learner"] = cpu_seconds
        return record

    async def _file(self, record: Record) -> None:
        """Write a line, or keep it until its evaluation, asked for here, has arrived."""
        if not self._is_evaluated(record["step"]):
            self._books.enter_step(record, None)
            return
        await self._wires.requests.send(EvaluationRequest(version=record["version"]))
        self._unwritten = record

    async def _file_evaluated(self) -> None:
        """Wait for the evaluation that is on its way, if any, and write its line; on a stop without it."""
        if self._unwritten is None:
            return
        record, self._unwritten, self._was_evaluated = self._unwritten, None, True
        self._report("waiting for the evaluation")
        if record["version"] == self._trainer.version:
            result = await self._made_with_newest(EvaluationResult)
        else:
            result = await self._made_with_last(record["version"])
        self._books.enter_step(record, result)

    async def _made_with_last(self, version: int) -> EvaluationResult | None:
        """The evaluation of weights that the engines still have, but the trainer no longer.

        Once the last worker that has them is lost, nobody can make it any more: None.
        """
        result = await self._wires.inbox.next(
            EvaluationResult,
            version=version,
            deadline_seconds=self._deadline_seconds(version),
            unless=lambda: self._publisher.has_newcomers and not self._publisher.has_installed,
        )
        if result is None and not self._wires.inbox.is_stopping:
            log.warning("version %d was lost with its last inference worker: it is not evaluated", version)
        return result

    async def _save(self) -> None:
        """Have a checkpoint written while training goes on, unless there is one of these weights; wait for the last."""
        if self._trainer.version != self._saved_step:
            await self._begin_checkpoint()
        if not self._goes_on():
            self._report("writing a checkpoint")
            await self._saver.done()

    async def _begin_checkpoint(self) -> None:
        version = self._trainer.version
        self._report("waiting for the checkpoint before")
        await self._saver.done()
        self._report("copying a checkpoint")
        self._saved_step = version
        state = await self._self_play_state(version)
        self._saver.begin(await self._torch.run(partial(self._checkpoint, version, state)))

    async def _self_play_state(self, version: int) -> str:
        """How self-play can go on with these weights. It answers at once, whatever it waits for itself."""
        await self._wires.requests.send(StateRequest(version=version, kept_step=self._saver.kept_step))
        answer = await self._wires.inbox.next(
            SelfPlayState,
            version=version,
            deadline_seconds=self._config.wires.step_seconds,
            also_when_stopping=True,
        )
        return answer.state if answer else ""

    def _checkpoint(self, version: int, self_play: str) -> checkpoints.Content:
        weights, optimizer = self._trainer.checkpoint_state()
        return checkpoints.copied(
            self._loaded.model,
            optimizer,
            step=version,
            version=version,
            extra={"wall_seconds": time.monotonic() - self._started, **self._lag.numbers()},
            self_play=self_play,
            weights=weights,
        )
