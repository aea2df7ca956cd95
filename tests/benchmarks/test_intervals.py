"""The numbers under the benchmarks' tables."""

import math
import statistics
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, lists

from benchmarks.intervals import Candidate, interval, percentile, recommended, value_at

some_floats = floats(-1e3, 1e3)


def test_an_interval_of_three_covers_the_mean_in_95_of_100_cases() -> None:
    random = Random(1)
    intervals = [interval([random.gauss(5.0, 2.0) for _ in range(3)]) for _ in range(1000)]
    covered = sum(abs(one.mean - 5.0) <= one.half for one in intervals)
    assert covered / 1000 == pytest.approx(0.95, abs=0.025)


def test_one_value_has_no_interval() -> None:
    assert interval([0.3]).half == math.inf
    assert str(interval([0.3])) == "0.300"
    assert str(interval([0.25, 0.35])) == "0.300 ± 0.635"


@given(heights=lists(some_floats, min_size=1, max_size=8), x=floats(-2.0, 12.0))
def test_a_curve_stays_between_its_points_and_goes_through_them(heights: list[float], x: float) -> None:
    curve = [(float(place), height) for place, height in enumerate(heights)]
    assert min(heights) - 1e-9 <= value_at(x, curve) <= max(heights) + 1e-9
    assert [value_at(place, curve) for place, _ in curve] == pytest.approx(heights)


def test_a_curve_is_straight_between_its_points() -> None:
    assert value_at(3.0, [(4.0, 1.0), (2.0, 0.0)]) == 0.5


@given(values=lists(integers(0, 9), min_size=1), share=floats(0.01, 1.0))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[int], share: float) -> None:
    found = percentile(Counter(values), share)
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def candidates(*rows: tuple[float, list[float]]) -> list[Candidate]:
    return [Candidate(f"max_lag {number}", rate, accuracies) for number, (rate, accuracies) in enumerate(rows)]


def test_recommended_is_the_smallest_bound_that_is_nearly_the_fastest() -> None:
    chosen, reason = recommended(
        candidates((70.0, [0.35, 0.36, 0.34]), (95.0, [0.35, 0.34, 0.36]), (100.0, [0.36, 0.36, 0.33]))
    )
    assert chosen.name == "max_lag 1"
    assert "95% of that of max_lag 2" in reason


def test_a_fast_bound_that_is_surely_less_accurate_is_not_recommended() -> None:
    chosen, _ = recommended(candidates((100.0, [0.20, 0.21, 0.19]), (99.0, [0.35, 0.36, 0.34])))
    assert chosen.name == "max_lag 1"


def test_the_most_accurate_is_recommended_where_none_is_fast_and_good() -> None:
    chosen, reason = recommended(candidates((50.0, [0.35, 0.36, 0.34]), (100.0, [0.20, 0.21, 0.19])))
    assert chosen.name == "max_lag 0"
    assert "none of the fast ones" in reason


@given(
    rates=lists(floats(1.0, 100.0), min_size=1, max_size=5),
    accuracies=lists(lists(floats(0.0, 1.0), min_size=3, max_size=3), min_size=5, max_size=5),
)
def test_what_is_recommended_is_fast_or_the_most_accurate(rates: list[float], accuracies: list[list[float]]) -> None:
    everybody = candidates(*zip(rates, accuracies, strict=False))
    chosen, _ = recommended(everybody)
    means = {one.name: statistics.fmean(one.accuracies) for one in everybody}
    assert chosen.useful_rate >= 0.9 * max(rates) or means[chosen.name] == max(means.values())
