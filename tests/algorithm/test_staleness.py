"""The lag bound, against any interleaving of admissions, completions, rejections, batches and versions."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from azr_async.algorithm.staleness import Flow, check_lag, lag_of
from azr_async.errors import TrainingError
from azr_async.messages import TASKS, Admission, Role, Rollout, Task


def rollout(
    group_id: int, role: Role, task: Task, version: int, rollout_id: int = 0, newest: int | None = None
) -> Rollout:
    versions = np.array([-1, version, version if newest is None else newest], np.int32)
    return Rollout(
        rollout_id=rollout_id,
        group_id=group_id,
        role=role,
        task=task,
        token_ids=np.zeros(3, np.int32),
        behavior_logp=np.zeros(3, np.float32),
        token_version=versions,
        reward=0.0,
    )


def flow(
    max_lag: int = 1,
    late: str = "wait",
    propose: int = 2,
    solve: int = 6,
    attempts: int = 2,
    tasks: tuple[Task, ...] = TASKS,
) -> Flow:
    return Flow(
        max_lag=max_lag,
        propose_samples=propose,
        solve_samples=solve,
        trained_attempts=attempts,
        tasks=tasks,
        late="drop" if late == "drop" else "wait",
    )


class FlowMachine(RuleBasedStateMachine):
    """A learner that prefetches, engines that finish in any order, proposals that turn out invalid."""

    late = "wait"
    tries = 1
    """Until a batch is there, when everything admitted has finished and the window was filled before each."""
    propose, solve = 2, 6
    tasks: tuple[Task, ...] = TASKS

    @initialize(max_lag=st.integers(0, 4), attempts=st.sampled_from([1, 2, 3]))
    def start(self, max_lag: int, attempts: int) -> None:
        attempts = min(attempts, self.solve // self.propose)
        self.flow = flow(max_lag, self.late, self.propose, self.solve, attempts, self.tasks)
        self.ids: Iterator[int] = count()
        self.open: list[tuple[Admission, int]] = []
        self.requested = 0
        self.consumed_ids: set[int] = set()
        self.dropped = 0
        self.bounds: dict[int, int] = {}
        """By group: the bound at its admission."""
        self.widest = max_lag

    @rule(times=st.integers(1, 12))
    def admit(self, times: int) -> None:
        for _ in range(times):
            admission = self.flow.admit(self.tasks)
            if admission is not None:
                self.open.append((admission, self.flow.version))
                self.bounds[admission.group_id] = self.flow.max_lag

    def _finish(self, index: int, *, delay: int, valid: bool) -> None:
        admission, admitted = self.open.pop(index % len(self.open))
        version = min(self.flow.version, admitted + delay)
        group, task = admission.group_id, admission.task
        if admission.is_proposal:
            self.flow.complete(rollout(group, "propose", task, version, next(self.ids), newest=self.flow.version))
        if valid:
            for _ in range(admission.trained_attempts):
                self.flow.complete(rollout(group, "solve", task, version, next(self.ids), newest=self.flow.version))
        else:
            self.flow.release(group, ("solve", task))

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 1000), delay=st.integers(0, 3), valid=st.booleans())
    def finish(self, index: int, delay: int, valid: bool) -> None:
        self._finish(index, delay=delay, valid=valid)

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 1000))
    def refuse_untrained(self, index: int) -> None:
        """A held-out program was proposed, say: no sample at all comes of the group."""
        admission, _ = self.open.pop(index % len(self.open))
        if admission.is_proposal:
            self.flow.release(admission.group_id, ("propose", admission.task))
        self.flow.release(admission.group_id, ("solve", admission.task))

    @precondition(lambda self: self.open)
    @rule(share=st.floats(0, 1))
    def finish_many(self, share: float) -> None:
        for _ in range(int(share * len(self.open))):
            self._finish(len(self.open) - 1, delay=0, valid=True)

    @rule(stragglers=st.integers(0, 3), delay=st.integers(0, 2))
    def one_step(self, stragglers: int, delay: int) -> None:
        """The usual course of things, but for a few groups that take their time."""
        self.admit(200)
        while len(self.open) > stragglers:
            self._finish(len(self.open) - 1, delay=delay, valid=True)
        if self.requested <= self.flow.version + 1:
            self.compose()
        if self.flow.version < self.requested:
            self.install()

    @precondition(lambda self: self.requested <= self.flow.version + 1)
    @rule()
    def compose(self) -> None:
        swept = self.flow.sweep(self.requested)
        self.dropped += len(swept)
        batch = self.flow.compose(self.requested, self.tasks)
        if batch is None:
            return
        assert all(0 <= lag_of(sample, self.requested) <= self.bounds[sample.group_id] for sample in batch)
        ids = {sample.rollout_id for sample in batch}
        assert len(ids) == len(batch) == len(self.tasks) * (self.propose + self.solve)
        assert not ids & self.consumed_ids
        self.consumed_ids |= ids
        self.requested += 1

    @precondition(lambda self: self.flow.version < self.requested)
    @rule()
    def install(self) -> None:
        self.flow.installed(self.flow.version + 1)

    @invariant()
    def no_window_is_exceeded(self) -> None:
        if hasattr(self, "flow"):
            for (role, _), (flying, ready) in self.flow.alive().items():
                assert flying + ready <= (self.widest + 1) * (self.propose if role == "propose" else self.solve)

    def teardown(self) -> None:
        """Whatever happened before, the run goes on: everything admitted finishes, and batches can be composed."""
        if not hasattr(self, "flow"):
            return
        for _ in range(self.widest + self.flow.max_lag + 2):
            while self.flow.version < self.requested:
                self.flow.installed(self.flow.version + 1)
            before = self.requested
            for _ in range(self.tries):
                if self.requested == before:
                    self._finish_everything()
                    self.compose()
            assert self.requested == before + 1, "the flow is stuck"

    def _finish_everything(self) -> None:
        for _ in range(100):
            self.admit(50)
            if not self.open:
                break
            while self.open:
                self._finish(0, delay=9, valid=True)


class WaitingFlow(FlowMachine):
    """Waiting for late samples, nothing is ever dropped: the theorem of the module's docstring."""

    @invariant()
    def nothing_is_dropped(self) -> None:
        assert getattr(self, "dropped", 0) == 0


class WaitingFlowOfOneCellPair(WaitingFlow):
    """So small that any order of completions is reached: a batch is one proposal and one attempt."""

    propose, solve = 1, 1
    tasks = ("deduction",)


class DroppingFlow(FlowMachine):
    late = "drop"


class ChangingFlow(WaitingFlow):
    """The bound is raised and lowered at any moment: nothing admitted becomes illegal, nothing is dropped or stuck."""

    @rule(max_lag=st.integers(0, 5))
    def change_the_bound(self, max_lag: int) -> None:
        self.flow.max_lag = max_lag
        self.widest = max(self.widest, max_lag)


class ChangingFlowOfOneCellPair(ChangingFlow):
    propose, solve = 1, 1
    tasks = ("deduction",)


class ChangingFlowThatIsFilledFromTheLibrary(ChangingFlow):
    """The solver's window is much larger than what the proposals fill."""

    propose, solve = 2, 9
    tasks = ("deduction",)


class ChangingDroppingFlow(DroppingFlow, ChangingFlow):
    """Where the bound has fallen, all slots may hold what is too old by now: the first try only sweeps it."""

    tries = 2

    @invariant()
    def nothing_is_dropped(self) -> None:
        """It may be, here."""


TestWaitingFlow = WaitingFlow.TestCase
TestWaitingFlow.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestWaitingFlowOfOneCellPair = WaitingFlowOfOneCellPair.TestCase
TestWaitingFlowOfOneCellPair.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestDroppingFlow = DroppingFlow.TestCase
TestDroppingFlow.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
TestChangingFlow = ChangingFlow.TestCase
TestChangingFlow.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestChangingFlowOfOneCellPair = ChangingFlowOfOneCellPair.TestCase
TestChangingFlowOfOneCellPair.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestChangingFlowThatIsFilledFromTheLibrary = ChangingFlowThatIsFilledFromTheLibrary.TestCase
TestChangingFlowThatIsFilledFromTheLibrary.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestChangingDroppingFlow = ChangingDroppingFlow.TestCase
TestChangingDroppingFlow.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


def test_young_samples_do_not_overtake_so_many_old_ones_that_a_later_batch_cannot_hold_them() -> None:
    """max_lag 2, batches of one: with g1 and g2 of version 0 still flying, batch 1 must not be g3 of version 1."""
    window = flow(2, propose=1, solve=1, attempts=1, tasks=("deduction",))

    groups: list[int] = []

    def admit() -> bool:
        admission = window.admit(())
        groups.extend([admission.group_id] if admission else [])
        return admission is not None

    def finish(number: int, version: int) -> None:
        window.complete(rollout(groups[number], "propose", "deduction", version))
        window.complete(rollout(groups[number], "solve", "deduction", version))

    def groups_of(batch: list[Rollout] | None) -> set[int] | None:
        return None if batch is None else {groups.index(sample.group_id) for sample in batch}

    assert [admit() for _ in range(4)] == [True, True, True, False]
    finish(0, 0)
    assert groups_of(window.compose(0, ())) == {0}
    window.installed(1)
    assert admit()
    finish(3, 1)
    assert window.compose(1, ()) is None
    finish(2, 0)
    assert groups_of(window.compose(1, ())) == {2}
    window.installed(2)
    finish(1, 0)
    assert groups_of(window.compose(2, ())) == {1}
    assert window.sweep(3) == []


def test_a_lowered_bound_holds_for_what_is_admitted_from_then_on() -> None:
    """max_lag 2 with three batches under way: they are trained within 2, and the next one is admitted after them."""
    window = flow(2, propose=1, solve=1, attempts=1, tasks=("deduction",))

    def admit() -> list[Admission]:
        return [admission for _ in range(9) if (admission := window.admit(())) is not None]

    groups = admit()
    assert len(groups) == 3
    window.max_lag = 0
    for group in groups:
        window.complete(rollout(group.group_id, "propose", "deduction", 0))
        window.complete(rollout(group.group_id, "solve", "deduction", 0))
    for version in range(3):
        assert admit() == []
        assert window.sweep(version) == []
        batch = window.compose(version, ())
        assert batch is not None
        assert {lag_of(sample, version) for sample in batch} == {version}
        window.installed(version + 1)
    assert len(admit()) == 1


def test_a_lowered_bound_leaves_a_way_for_proposals_where_old_attempts_fill_the_window() -> None:
    """Three of four proposals are refused at the moment in which the bound falls; one batch needs two of them."""
    window = flow(1, propose=2, solve=6, attempts=2, tasks=("deduction",))
    groups = [admission for _ in range(99) if (admission := window.admit(("deduction",))) is not None]
    assert sum(group.is_proposal for group in groups) == 4
    window.max_lag = 0
    for group in [group for group in groups if group.is_proposal][:3]:
        window.release(group.group_id, ("propose", "deduction"))
        window.release(group.group_id, ("solve", "deduction"))
    again = window.admit(("deduction",))
    assert again is not None
    assert (again.is_proposal, again.trained_attempts) == (True, 0)


def test_with_max_lag_0_a_second_batch_is_admitted_only_after_the_weights_of_the_first_arrived() -> None:
    window = flow(max_lag=0)
    admitted = [admission for _ in range(99) if (admission := window.admit(TASKS)) is not None]
    for admission in admitted:
        for _ in range(admission.is_proposal):
            window.complete(rollout(admission.group_id, "propose", admission.task, 0))
        for _ in range(admission.trained_attempts):
            window.complete(rollout(admission.group_id, "solve", admission.task, 0))
    assert window.compose(0, TASKS) is not None
    assert window.admit(TASKS) is None
    window.installed(1)
    assert window.admit(TASKS) is not None


def test_a_solver_cell_without_any_task_is_excused() -> None:
    window = flow(max_lag=0, propose=1, solve=2)
    while (admission := window.admit(())) is not None:
        window.complete(rollout(admission.group_id, "propose", admission.task, 0))
        window.release(admission.group_id, ("solve", admission.task))
    batch = window.compose(0, ())
    assert batch is not None
    assert {sample.role for sample in batch} == {"propose"}


def test_the_oldest_samples_are_trained_first() -> None:
    window = flow(max_lag=3, propose=1, solve=1, attempts=1)
    groups = [admission for _ in range(99) if (admission := window.admit(TASKS)) is not None]
    assert len(groups) == 3 * 4
    window.installed(0)
    for admission in reversed(groups):
        window.complete(rollout(admission.group_id, "propose", admission.task, 0))
        window.complete(rollout(admission.group_id, "solve", admission.task, 0))
    batch = window.compose(0, TASKS)
    assert batch is not None
    assert {sample.group_id for sample in batch} == {admission.group_id for admission in groups[:3]}


def test_a_batch_beyond_its_bound_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match=r"rollout 7 of group 3 has tokens of versions 1\.\.1"):
        check_lag([rollout(3, "solve", "abduction", 1, 7)], version=4, max_lag=2)


def test_tokens_from_the_future_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"versions 2\.\.5"):
        check_lag([rollout(3, "solve", "abduction", 2, 7, newest=5)], version=4, max_lag=2)


def test_a_sample_without_a_slot_is_refused() -> None:
    with pytest.raises(TrainingError, match="without an admitted slot"):
        flow().complete(rollout(99, "solve", "deduction", 0))


@given(
    orders=st.lists(st.permutations(range(12)), min_size=2, max_size=2),
    bad=st.sets(st.integers(0, 11), max_size=6),
)
def test_with_max_lag_0_the_numbers_of_groups_do_not_depend_on_who_was_quicker(
    orders: list[list[int]], bad: set[int]
) -> None:
    """Some proposals turn out invalid, in any order: tasks of the library take the places of their attempts."""

    def numbers(order: list[int]) -> set[Admission]:
        window = flow(max_lag=0, propose=4, solve=8, attempts=2)
        window.installed(0)
        started = [admission for _ in range(99) if (admission := window.admit(TASKS)) is not None]
        proposals = sorted((group for group in started if group.is_proposal), key=lambda group: group.group_id)
        for place in order:
            window.complete(rollout(proposals[place].group_id, "propose", proposals[place].task, 0))
            if place in bad:
                window.release(proposals[place].group_id, ("solve", proposals[place].task))
                started += [admission for _ in range(2) if (admission := window.admit(TASKS)) is not None]
        return set(started)

    assert numbers(orders[0]) == numbers(orders[1])


def test_groups_that_an_earlier_process_left_are_started_anew_under_their_numbers() -> None:
    earlier, window = flow(max_lag=1), flow(max_lag=0)
    left = [admission for _ in range(99) if (admission := earlier.admit(TASKS)) is not None]
    window.first_group = 6 * len(left)
    window.installed(7)
    left_out = window.reissue(left)
    again = [admission for _ in range(99) if (admission := window.admit(TASKS)) is not None]
    started_anew = [group for group in left if group not in left_out]
    assert len(left_out) == len(left) / 2  # there is room for one batch now, and was for two
    assert again == [replace(group, version=7) for group in started_anew]


def test_new_weights_that_are_told_twice_number_the_groups_once() -> None:
    window = flow(max_lag=3)
    first = window.admit(TASKS)
    window.installed(0)
    second = window.admit(TASKS)
    assert first is not None
    assert second is not None
    assert first.group_id != second.group_id
