"""Numbers of repeated measurements: intervals over seeds, values along a curve, and which setting they speak for."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from scipy.stats import t

CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval (Student); infinitely wide for a single value."""

    mean: float
    half: float

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 10 else 0
        return f"{self.mean:,.{digits}f}" + (f" ± {self.half:,.{digits}f}" if math.isfinite(self.half) else "")


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value."""
    if len(values) < 2:
        return Interval(values[0], math.inf)
    half = t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), float(half))


def value_at(x: float, curve: Sequence[tuple[float, float]]) -> float:
    """The height at `x` of the lines between the points of a curve; beyond its ends, that of the end."""
    (last_x, last_y), *rest = sorted(curve)
    for next_x, next_y in rest:
        if x <= next_x:
            share = max(0.0, x - last_x) / (next_x - last_x)
            return last_y + share * (next_y - last_y)
        last_x, last_y = next_x, next_y
    return last_y


def percentile(counts: Mapping[int, int], share: float) -> int:
    """The smallest value that at least this share of all does not exceed."""
    needed = share * sum(counts.values())
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    raise ValueError("there is nothing to count")


@dataclass(frozen=True)
class Candidate:
    """A lag bound as the recommendation sees it; one accuracy for each seed, in the same order everywhere."""

    name: str
    useful_rate: float
    """Trained tokens per second, times the effective share of the samples."""
    accuracies: Sequence[float]
    """Held out, at equal wall time."""


def recommended(candidates: Sequence[Candidate], *, tolerance: float = 0.1) -> tuple[Candidate, str]:
    """The first candidate that is nearly the fastest and not provably less accurate than the most accurate; and why.

    Candidates come in order of preference: the smaller bound first. Nearly the fastest: its useful rate is within
    `tolerance` of the best. Less accurate is one whose differences to the most accurate, seed by seed, have a 95 %
    interval below 0. Where nobody is both, it is the most accurate.
    """
    fastest = max(candidates, key=lambda one: one.useful_rate)
    best = max(candidates, key=lambda one: statistics.fmean(one.accuracies))
    for one in candidates:
        differences = interval([mine - its for mine, its in zip(one.accuracies, best.accuracies, strict=True)])
        is_fast = one.useful_rate >= (1.0 - tolerance) * fastest.useful_rate
        if is_fast and (one is best or differences.mean + differences.half >= 0.0):
            share = one.useful_rate / fastest.useful_rate
            return one, (
                f"it is the smallest bound with at least {1 - tolerance:.0%} of the best useful throughput "
                f"({share:.0%} of that of {fastest.name}) that is not provably less accurate than {best.name} "
                f"({100 * differences.mean:+.1f} ± {100 * differences.half:.1f} points at equal wall time)"
            )
    return best, "it is the most accurate at equal wall time; none of the fast ones is as good"
