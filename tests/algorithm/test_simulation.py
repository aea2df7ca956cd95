"""The model run against what can be worked out by hand, and the bound's search against the model run."""

from dataclasses import replace
from statistics import fmean

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_async.algorithm.lag_control import LagSettings, LagState, Measurement, observed
from azr_async.algorithm.simulation import CellLoad, Machine, Outcome, Step, Workload, simulate
from azr_async.algorithm.simulation.cores import Cores, Process
from azr_async.messages import CELLS, TASKS

FREE = Machine(
    engines=1,
    slots=64,
    step_seconds=0.0,
    row_seconds=0.0,
    prefill_seconds=0.0,
    prompt_seconds=0.0,
    sandbox_workers=4,
    check_seconds=0.0,
    file_seconds=0.0,
    learner_seconds=0.0,
    learner_token_seconds=0.0,
    push_seconds=0.0,
    pause_seconds=0.0,
)
WORK = Workload(
    max_lag=1,
    propose_samples=2,
    solve_samples=6,
    attempts=3,
    trained_attempts=3,
    tasks=TASKS,
    cells=dict.fromkeys(CELLS, CellLoad(tokens=5.0, tokens_std=0.0, checks=1.0)),
    valid_rate=1.0,
)
SAMPLES = 3 * (2 + 6)
TOKENS = 5 * SAMPLES


def seconds_per_step(outcome: Outcome) -> float:
    return fmean(step.seconds for step in outcome.steps[5:])


@given(
    cores=st.integers(1, 4),
    jobs=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.01, 5.0)), min_size=1, max_size=8),
)
def test_shared_cores_do_all_work_and_never_more_than_they_can(cores: int, jobs: list[tuple[float, float]]) -> None:
    env = simpy.Environment()
    shared, ends = Cores(env, cores), list[float]()

    def job(start: float, seconds: float) -> Process:
        yield env.timeout(start)
        yield shared.work(seconds)
        assert env.now >= start + seconds - 1e-6
        ends.append(env.now)

    for start, seconds in jobs:
        env.process(job(start, seconds))
    env.run()
    assert len(ends) == len(jobs)
    first = min(start for start, _ in jobs)
    assert max(ends) - first >= sum(seconds for _, seconds in jobs) / cores - 1e-6
    assert max(ends) <= max(start for start, _ in jobs) + sum(seconds for _, seconds in jobs) + 1e-6


def test_two_equal_jobs_on_one_core_take_twice_as_long() -> None:
    env = simpy.Environment()
    shared = Cores(env, 1)
    both = env.all_of([shared.work(1.0), shared.work(1.0)])
    env.run(until=both)
    assert env.now == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("machine", "slowest_seconds"),
    [
        (replace(FREE, learner_token_seconds=0.01), 0.01 * TOKENS),
        (replace(FREE, file_seconds=0.01), 0.01 * SAMPLES),
        (replace(FREE, sandbox_workers=2, check_seconds=0.1), 0.1 * SAMPLES / 2),
        (replace(FREE, row_seconds=0.01), 0.01 * TOKENS),
    ],
    ids=["learner", "selfplay", "sandbox", "inference"],
)
def test_with_a_large_bound_the_slowest_part_alone_sets_the_pace(machine: Machine, slowest_seconds: float) -> None:
    outcome = simulate(machine, replace(WORK, max_lag=4), steps=30)
    assert seconds_per_step(outcome) == pytest.approx(slowest_seconds, rel=0.02)


def test_synchronously_the_parts_wait_for_each_other() -> None:
    """Proposals of 5 tokens, then attempts at them, of which the first start a token ahead; learner, push, pause."""
    machine = replace(FREE, step_seconds=0.1, learner_seconds=2.0, push_seconds=0.5, pause_seconds=0.25)
    outcome = simulate(machine, replace(WORK, max_lag=0), steps=20)
    assert seconds_per_step(outcome) == pytest.approx(5 * 0.1 + 6 * 0.1 + 2.0 + 0.5 + 0.25)
    assert {step.lag_max for step in outcome.steps} == {0}


def test_two_engines_halve_what_the_rows_cost() -> None:
    machine = replace(FREE, row_seconds=0.01)
    work = replace(WORK, max_lag=3)
    one, two = (seconds_per_step(simulate(replace(machine, engines=count), work, steps=30)) for count in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.05)


def test_shared_cores_slow_all_parts_down() -> None:
    machine = replace(FREE, row_seconds=0.01, learner_token_seconds=0.01)
    work = replace(WORK, max_lag=4)
    own, shared = (seconds_per_step(simulate(replace(machine, cores=c), work, steps=30)) for c in (None, 1))
    assert own == pytest.approx(0.01 * TOKENS, rel=0.05)
    assert shared == pytest.approx(0.02 * TOKENS, rel=0.05)


def test_an_evaluation_holds_the_next_push() -> None:
    machine = replace(FREE, row_seconds=0.01)
    work = replace(WORK, evaluated_samples=100, evaluated_every=1)
    plain, evaluated = (seconds_per_step(simulate(machine, one, steps=20)) for one in (WORK, work))
    assert evaluated == pytest.approx(plain + 0.01 * 5 * 100, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(
    max_lag=st.integers(0, 4),
    engines=st.integers(1, 3),
    slots=st.integers(1, 40),
    valid_rate=st.floats(0.0, 1.0),
    times=st.lists(st.floats(0.0, 0.1), min_size=9, max_size=9),
    seed=st.integers(0, 99),
)
def test_no_model_run_gets_stuck_or_beyond_the_bound(
    max_lag: int, engines: int, slots: int, valid_rate: float, times: list[float], seed: int
) -> None:
    machine = Machine(
        engines=engines,
        slots=slots,
        sandbox_workers=2,
        step_seconds=times[0] + 1e-3,
        row_seconds=times[1],
        prefill_seconds=times[8],
        prompt_seconds=times[2],
        check_seconds=times[3],
        file_seconds=times[4],
        learner_seconds=times[5],
        learner_token_seconds=times[6] / 100,
        push_seconds=times[7],
        pause_seconds=times[0],
    )
    outcome = simulate(machine, replace(WORK, max_lag=max_lag, valid_rate=valid_rate), steps=8, seed=seed)
    assert len(outcome.steps) == 8
    assert outcome.dropped == 0
    assert all(step.lag_max <= max_lag for step in outcome.steps)


@pytest.mark.parametrize(
    ("ess_loss", "generation_seconds"),
    [(0.0, 0.01), (0.3, 0.01), (0.02, 0.002)],
    ids=["staleness is free", "staleness is dear", "inference is fast"],
)
def test_auto_ends_within_a_tenth_of_the_best_fixed_bound(ess_loss: float, generation_seconds: float) -> None:
    """Useful throughput of the last 200 steps, tries and all, against that of every fixed bound that it may choose."""
    limits = LagSettings(floor=0, ceiling=6, steps=9, least_gain=0.02)
    cells = dict.fromkeys(CELLS, CellLoad(tokens=8.0, tokens_std=2.0, checks=1.0))
    work = replace(WORK, cells=cells, ess_loss=ess_loss)
    machine = replace(FREE, step_seconds=0.02, row_seconds=generation_seconds, learner_seconds=0.8, check_seconds=0.02)
    state = LagState.first(limits)

    def control(step: Step) -> int:
        nonlocal state
        measurement = Measurement(trained_tokens=step.trained_tokens, ess=step.ess, seconds=step.seconds)
        state, _ = observed(state, measurement, limits)
        return state.bound

    def useful(steps: list[Step]) -> float:
        return sum(step.trained_tokens * step.ess for step in steps) / sum(step.seconds for step in steps)

    fixed = [useful(simulate(machine, replace(work, max_lag=bound), steps=40).steps[10:]) for bound in range(7)]
    controlled = simulate(machine, replace(work, max_lag=state.bound), steps=360, control=control)
    assert useful(controlled.steps[-200:]) >= 0.9 * max(fixed)
    assert max(step.lag_max for step in controlled.steps) <= limits.ceiling
