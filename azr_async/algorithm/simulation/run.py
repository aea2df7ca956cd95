"""The simulated self-play and learner around the engines."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import simpy

from azr_async.algorithm.simulation.cores import Cores, Process
from azr_async.algorithm.simulation.engines import Engines, Sample
from azr_async.algorithm.simulation.model import Machine, Outcome, Step, Workload
from azr_async.algorithm.staleness import Flow, lag_of
from azr_async.messages import Admission, Cell, Role, Rollout


def simulate(
    machine: Machine,
    workload: Workload,
    *,
    steps: int,
    seed: int = 0,
    control: Callable[[Step], int] | None = None,
) -> Outcome:
    """Play `steps` optimizer steps. `control` is asked after each for the staleness bound from then on."""
    env = simpy.Environment()
    run = _Run(env, machine, workload, seed=seed)
    env.run(until=env.process(run.learner(steps, control)))
    run.outcome.seconds = env.now
    return run.outcome


@dataclass(slots=True)
class _Group:
    """Samples that are judged together."""

    admission: Admission | None
    """None: an evaluation's."""
    attempts: int = 0
    proposal: Rollout | None = None
    judged: list[Rollout] = field(default_factory=list)


class _Run:
    """Self-play and the learner, and what they share."""

    def __init__(self, env: simpy.Environment, machine: Machine, workload: Workload, *, seed: int) -> None:
        self.outcome = Outcome()
        self._env, self._machine, self._workload = env, machine, workload
        self._random, self._numbers = random.Random(seed), count()
        self._cores = Cores(env, machine.cores)
        self._sandbox = simpy.Resource(env, machine.sandbox_workers)
        self._thread = simpy.Resource(env, 1)
        self._flow = Flow(
            max_lag=workload.max_lag,
            propose_samples=workload.propose_samples,
            solve_samples=workload.solve_samples,
            trained_attempts=workload.trained_attempts,
            tasks=workload.tasks,
            late=workload.late,
        )
        self._engines: Engines[_Group] = Engines(
            env,
            self._cores,
            machine,
            self.outcome,
            mean_tokens=sum(load.tokens for load in workload.cells.values()) / len(workload.cells),
            seed=seed,
            on_done=self._judge,
        )
        self._wanted: tuple[int, simpy.Event] | None = None
        self._evaluated_left, self._evaluated = 0, env.event()

    def learner(self, steps: int, control: Callable[[Step], int] | None) -> Process:
        """Batches -> steps -> pushes; the next batch is composed while a step is computed."""
        env, every, began = self._env, self._workload.evaluated_every, 0.0
        batch_ready = self._request(0)
        for version in range(steps):
            batch: list[Rollout] = yield batch_ready
            batch_ready = self._request(version + 1)
            yield from self._train(batch)
            if self._evaluated_left:
                yield self._evaluated
            yield env.timeout(self._machine.push_seconds)
            yield from self._engines.install(version + 1)
            step = self._step(batch, version, seconds=env.now - began)
            began = env.now
            self.outcome.steps.append(step)
            if control is not None:
                self._flow.max_lag = control(step)
            self._flow.installed(version + 1)
            if self._workload.evaluated_samples and every and (version + 1) % every == 0:
                self._evaluate()
            self._changed()

    def _train(self, batch: list[Rollout]) -> Process:
        began, machine = self._env.now, self._machine
        tokens = sum(len(rollout.token_ids) for rollout in batch)
        yield self._cores.work(machine.learner_seconds + machine.learner_token_seconds * tokens)
        self.outcome.busy_seconds["learner"] += self._env.now - began

    def _step(self, batch: list[Rollout], version: int, *, seconds: float) -> Step:
        lags = [lag_of(rollout, version) for rollout in batch]
        mean = sum(lags) / len(lags)
        return Step(
            seconds=seconds,
            trained_tokens=sum(len(rollout.token_ids) for rollout in batch),
            lag_mean=mean,
            lag_max=max(lags),
            ess=1.0 / (1.0 + self._workload.ess_loss * mean),
            busy_seconds=dict(self.outcome.busy_seconds),
        )

    def _request(self, version: int) -> simpy.Event:
        answer = self._env.event()
        self._wanted = (version, answer)
        self._changed()
        return answer

    def _changed(self) -> None:
        """The flow has: compose what is wanted, admit what there is room for."""
        flow, tasks = self._flow, self._workload.tasks
        if self._wanted is not None:
            version, answer = self._wanted
            self.outcome.dropped += len(flow.sweep(version))
            batch = flow.compose(version, tasks)
            if batch is not None:
                self._wanted = None
                answer.succeed(batch)
        while (admission := flow.admit(tasks)) is not None:
            group = _Group(admission)
            if admission.is_proposal:
                self._submit(group, ("propose", admission.task), admission, 1)
            else:
                self._solve(group, admission, admission.trained_attempts)

    def _solve(self, group: _Group, admission: Admission, attempts: int) -> None:
        group.attempts = attempts
        self._submit(group, ("solve", admission.task), admission, attempts)

    def _submit(self, group: _Group, cell: Cell, admission: Admission, samples: int) -> None:
        load = self._workload.cells[cell]
        self._engines.submit(group, cell, load, samples=samples, priority=admission.group_id)

    def _evaluate(self) -> None:
        """Held-out tasks go before all others."""
        workload = self._workload
        roles = Counter[Role]({"solve": workload.evaluated_samples, "propose": workload.evaluated_proposals})
        self._evaluated_left, self._evaluated = roles.total(), self._env.event()
        for number, role in enumerate(roles.elements()):
            cell = (role, workload.tasks[number % len(workload.tasks)])
            self._engines.submit(_Group(None), cell, workload.cells[cell], samples=1, priority=-1)

    def _judge(self, sample: Sample[_Group]) -> Process:
        """Self-play's thread, then the sandbox; then it is filed."""
        with self._thread.request() as turn:
            yield turn
            yield self._cores.work(self._machine.file_seconds)
        checks = self._workload.cells[sample.cell].checks
        whole = int(checks) + (self._random.random() < checks - int(checks))
        if whole:
            with self._sandbox.request() as place:
                yield place
                began = self._env.now
                yield self._cores.work(whole * self._machine.check_seconds)
                self.outcome.busy_seconds["sandbox"] += self._env.now - began
        group = sample.group
        if group.admission is None:
            self._evaluated_left -= 1
            if self._evaluated_left == 0:
                self._evaluated.succeed()
        else:
            self._file(group, group.admission, sample)

    def _file(self, group: _Group, admission: Admission, sample: Sample[_Group]) -> None:
        """A group that is whole goes into the flow."""
        rollout = self._rollout(admission, sample)
        if sample.cell[0] == "propose":
            group.proposal = rollout
            if self._random.random() < self._workload.valid_rate:
                self._solve(group, admission, self._workload.attempts)
                return
        else:
            group.judged.append(rollout)
            if len(group.judged) < group.attempts:
                return
        proposals = [group.proposal] if group.proposal else []
        for one in [*group.judged[: admission.trained_attempts], *proposals]:
            self._flow.complete(one)
        self._flow.release(admission.group_id, ("propose", admission.task))
        self._flow.release(admission.group_id, ("solve", admission.task))
        self._changed()

    def _rollout(self, admission: Admission, sample: Sample[_Group]) -> Rollout:
        return Rollout(
            rollout_id=next(self._numbers),
            group_id=admission.group_id,
            role=sample.cell[0],
            task=sample.cell[1],
            token_ids=np.zeros(sample.length, np.int32),
            behavior_logp=np.zeros(sample.length, np.float32),
            token_version=np.full(sample.length, sample.version, np.int32),
            reward=0.0,
        )
