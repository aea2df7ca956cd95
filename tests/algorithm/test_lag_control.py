"""The search for the best staleness bound: within its limits whatever is measured, near the optimum, and calm."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from statistics import mode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_async.algorithm.lag_control import Decision, LagSettings, LagState, Measurement, observed

WIDE = LagSettings(floor=0, ceiling=16, steps=8, least_gain=0.02)

anything = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0.0, 1.0),
    st.sampled_from([0.0, -1.0, 1e-308, 1e308, math.inf, math.nan]),
)


@st.composite
def limits(draw: st.DrawFn) -> LagSettings:
    floor = draw(st.integers(0, 5))
    return LagSettings(
        floor=floor,
        ceiling=floor + draw(st.integers(0, 30)),
        steps=draw(st.integers(2, 4)),
        least_gain=draw(st.floats(0.0, 1.0)),
    )


def run(
    rate: Callable[[int, int], float], steps: int, limits: LagSettings = WIDE, *, noise: float = 0.0, seed: int = 0
) -> tuple[list[int], list[Decision]]:
    """The bound at each step where `rate(bound, step)` useful tokens are trained per second; and all decisions."""
    state, generator = LagState.first(limits), random.Random(seed)
    bounds, decisions = [], []
    for step in range(steps):
        seconds = math.exp(generator.gauss(0.0, noise)) / rate(state.bound, step)
        state, decision = observed(state, Measurement(trained_tokens=1.0, ess=1.0, seconds=seconds), limits)
        bounds.append(state.bound)
        decisions += [decision] if decision else []
    return bounds, decisions


def moves(bounds: list[int]) -> int:
    return sum(before != after for before, after in pairwise(bounds))


@settings(max_examples=200, deadline=None)
@given(limits(), st.lists(st.tuples(anything, anything, anything), max_size=60))
def test_the_bound_stays_within_floor_and_ceiling_whatever_is_measured(
    within: LagSettings, measured: list[tuple[float, float, float]]
) -> None:
    state = LagState.first(within)
    for trained_tokens, ess, seconds in measured:
        state, decision = observed(state, Measurement(trained_tokens=trained_tokens, ess=ess, seconds=seconds), within)
        assert within.floor <= state.bound <= within.ceiling
        assert decision is None or decision.bound == state.bound
        assert all(math.isfinite(number) for number in state.numbers().values())


@settings(max_examples=100, deadline=None)
@given(limits(), st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=100))
def test_a_change_needs_the_steps_of_a_decision_unless_it_takes_a_try_back(
    within: LagSettings, seconds: list[float]
) -> None:
    state, since = LagState.first(within), 0
    for one in seconds:
        before = state
        state, _ = observed(state, Measurement(trained_tokens=5.0, ess=0.9, seconds=one), within)
        since += 1
        if state.bound != before.bound:
            assert since >= within.steps or state.bound == before.home
            assert since >= within.steps / 3
            since = 0


@settings(max_examples=60, deadline=None)
@given(best=st.integers(0, 16), steepness=st.floats(0.05, 0.5), seed=st.integers(0, 99))
def test_it_ends_within_a_tenth_of_the_best_bound(best: int, steepness: float, seed: int) -> None:
    """One peak, at any place; the steps' times scatter by a fiftieth."""

    def rate(bound: int, _: int) -> float:
        return math.exp(-steepness * abs(math.log((bound + 1) / (best + 1))))

    bounds, _ = run(rate, 900, noise=0.02, seed=seed)
    tail = [rate(bound, 0) for bound in bounds[-300:]]
    assert sum(tail) / len(tail) >= 0.9 * rate(best, 0)


def test_it_follows_when_the_best_bound_changes() -> None:
    def rate(bound: int, step: int) -> float:
        return 1.0 / (1.0 + abs(bound - (8 if step < 500 else 1)))

    bounds, _ = run(rate, 1500)
    assert mode(bounds[300:500]) == 8
    assert mode(bounds[-200:]) == 1


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_where_the_bound_makes_no_difference_it_soon_rests(noise: float) -> None:
    bounds, _ = run(lambda bound, step: 1.0, 2000, noise=noise)
    assert moves(bounds[1000:]) <= 1000 // 50


def test_at_equal_throughput_the_younger_data_wins() -> None:
    bounds, _ = run(lambda bound, step: 1.0 if bound >= 1 else 0.5, 400)
    assert mode(bounds[-200:]) == 1


def test_many_small_gains_are_found() -> None:
    """A step from rung to rung gains less than what counts as an improvement."""
    bounds, _ = run(lambda bound, step: 0.985 ** (16 - bound), 800)
    assert mode(bounds[-200:]) >= 6


def test_many_small_losses_on_the_way_down_do_not_add_up() -> None:
    limits = LagSettings(floor=0, ceiling=3, steps=8, least_gain=0.04)
    bounds, _ = run(lambda bound, step: 1.0 - 0.03 * (3 - bound), 800, limits)
    assert mode(bounds[-200:]) >= 2


def test_every_decision_gives_its_reason() -> None:
    _, decisions = run(lambda bound, step: 1.0 / (1 + abs(bound - 3)), 300)
    kinds = {decision.reason.split()[0] for decision in decisions}
    assert kinds >= {"tries", "keeps", "goes", "stays:"}
    assert all("useful tokens/s" in decision.reason for decision in decisions)


def test_unusable_measurements_change_nothing() -> None:
    state = LagState.first(WIDE)
    for bad in (math.nan, -1.0, math.inf, 0.0):
        assert observed(state, Measurement(trained_tokens=1.0, ess=1.0, seconds=bad), WIDE) == (state, None)
    assert observed(state, Measurement(trained_tokens=1.0, ess=math.nan, seconds=1.0), WIDE) == (state, None)


@given(st.integers(0, 300))
def test_a_restored_search_goes_on_where_it_was(steps: int) -> None:
    def rate(bound: int, _: int) -> float:
        return 1.0 / (1.0 + abs(bound - 8))

    state = LagState.first(WIDE)
    for _ in range(steps):
        measurement = Measurement(trained_tokens=1.0, ess=1.0, seconds=1.0 / rate(state.bound, 0))
        state, _ = observed(state, measurement, WIDE)
    again = LagState.restored(state.numbers(), WIDE)
    assert (again.bound, again.home, again.home_rate, again.direction, again.failures, again.wait) == (
        state.bound, state.home, state.home_rate, state.direction, state.failures, state.wait,
    )  # fmt: skip
    assert (again.count, again.settling) == (0, again.bound + 1)


@given(limits(), limits(), st.integers(0, 40))
def test_a_restored_search_obeys_the_limits_of_now(then: LagSettings, now: LagSettings, steps: int) -> None:
    state = LagState.first(then)
    for _ in range(steps):
        state, _ = observed(state, Measurement(trained_tokens=1.0, ess=1.0, seconds=1.0), then)
    again = LagState.restored(state.numbers(), now)
    assert now.floor <= again.bound <= now.ceiling
    assert again.home < 0 or now.floor <= again.home <= now.ceiling


def test_without_numbers_it_begins_anew() -> None:
    assert LagState.restored({"wall_seconds": 3.0}, WIDE) == LagState.first(WIDE)
