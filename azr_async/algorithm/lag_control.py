"""`flow.max_lag: auto`: which staleness bound makes the most of the machine.

What is maximised is useful throughput, rate of trained tokens x effective sample size share: a larger bound keeps the
stages busier, and makes the data worth less. The bound climbs over the rungs 0 to 6, 8, 10, 12, 16, ... between
a floor and a ceiling, one rung at a time:

    measure this rung -> try a neighbour -> settle -> measure it -> keep it or go back

A larger bound is kept when it is better by `least_gain` and by two standard errors. A smaller one is kept when it is no
worse, or when what is lost, with two standard errors, is less than `least_gain`: at equal throughput the younger data
wins. A kept move tries the next rung in its direction. Otherwise the bound goes back, the other direction is tried
next, and after both the tries reach a rung further, so that many small gains are found, and the wait until the next one
doubles: in a run that does not change, moves become rare. Where the noise hides the answer, a try goes on for up to
four times as many steps, and home is measured for as long as nothing is tried. A try that is much worse ends early.

Pure: `observed` maps a state and one step's measurement to the next state. All of a state is numbers, so that a
checkpoint can hold it.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Self

ERRORS: Final = 2.0
"""Standard errors by which two rungs must differ before the difference counts as one."""
LONGEST_WAIT: Final = 16  # decisions
BLOCKS: Final = 3
"""Per decision. In a pipeline a long step is followed by short ones: the scatter of blocks of steps tells the error."""
LONGEST_WINDOW: Final = 4 * BLOCKS
LONGEST_REACH: Final = 3  # rungs
HOPELESS: Final = 0.2  # relative loss
_KEPT: Final = ("bound", "home", "home_rate", "home_error", "direction", "failures", "wait")
_SHORTEST: Final = 1e-9
_LARGEST: Final = 1e60
"""Shorter or larger measurements are none: the squares of rates have to stay finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LagSettings:
    """Between which bounds, and how carefully."""

    floor: int
    ceiling: int
    steps: int
    """Measured per decision, at least; 2 or more."""
    least_gain: float
    """Relative improvement that is worth more staleness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One optimizer step."""

    trained_tokens: float
    ess: float
    """Effective sample size as a share of the tokens, 0 to 1."""
    seconds: float
    """Wall time since the step before."""

    @property
    def useful_tokens(self) -> float:
        """Trained tokens, each counted for as much as it is worth."""
        return self.trained_tokens * self.ess

    @property
    def is_usable(self) -> bool:
        """False for what cannot be a measurement: not finite, no time, a share that is none."""
        is_timed = _SHORTEST < self.seconds < _LARGEST
        return is_timed and 0.0 <= self.trained_tokens < _LARGEST and 0.0 <= self.ess <= 1.0 + 1e-6


class Decision(NamedTuple):
    """What was decided after a window of steps, and why."""

    bound: int
    reason: str


class _Score(NamedTuple):
    """Useful tokens per second at one rung."""

    rate: float
    error: float
    """Standard error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LagState:
    """Where the search stands. -1 stands for `none`."""

    bound: int
    home: int = -1
    """While a neighbour is tried: the bound to go back to."""
    home_rate: float = -1.0
    home_error: float = 0.0
    direction: int = 1
    failures: int = 0
    """Tries in a row that were not kept."""
    wait: int = 0
    """Decisions until the next try."""
    settling: int = 0
    """Steps that still contain samples admitted under the bound before."""
    count: int = 0
    """Steps in the block that is not full yet, and what they sum up to."""
    block_u: float = 0.0
    block_s: float = 0.0
    blocks: int = 0
    """Full blocks in the window; then sums over them: useful tokens u, seconds s and their products."""
    sum_u: float = 0.0
    sum_s: float = 0.0
    sum_uu: float = 0.0
    sum_us: float = 0.0
    sum_ss: float = 0.0

    @classmethod
    def first(cls, settings: LagSettings) -> Self:
        """The search begins at what is the default where the bound is fixed, as far as the limits allow."""
        bound = _clamped(2, settings)
        return cls(bound=bound, settling=bound + 1)

    def numbers(self) -> dict[str, float]:
        """For a checkpoint: all but the window."""
        return {name: float(getattr(self, name)) for name in _KEPT}

    @classmethod
    def restored(cls, numbers: Mapping[str, float], settings: LagSettings) -> Self:
        """The state that `numbers` were taken of; a new one when they do not say. The settings may be others now.

        The window starts anew: a process that goes on has to fill its pipeline first.
        """
        if not all(math.isfinite(numbers.get(name, math.nan)) for name in _KEPT):
            return cls.first(settings)
        bound, home = int(numbers["bound"]), int(numbers["home"])
        now = _clamped(bound, settings)
        if now != bound or (home >= 0 and home != _clamped(home, settings)):
            return cls(bound=now, settling=now + 1)
        return cls(
            bound=bound,
            settling=bound + 1,
            home=home,
            home_rate=numbers["home_rate"],
            home_error=numbers["home_error"],
            direction=int(numbers["direction"]),
            failures=int(numbers["failures"]),
            wait=int(numbers["wait"]),
        )


def observed(state: LagState, measurement: Measurement, settings: LagSettings) -> tuple[LagState, Decision | None]:
    """The state after one more step, and the decision that it led to, if one was due.

    A decision needs `settings.steps` usable measurements (a third, to give up a try), after those of the steps in which
    samples are trained that were admitted under another bound.
    """
    if not measurement.is_usable:
        return state, None
    if state.settling > 0:
        return replace(state, settling=state.settling - 1), None
    u, s = state.block_u + measurement.useful_tokens, state.block_s + measurement.seconds
    if state.count + 1 < math.ceil(settings.steps / BLOCKS):
        return replace(state, count=state.count + 1, block_u=u, block_s=s), None
    state = replace(
        state,
        count=0,
        block_u=0.0,
        block_s=0.0,
        blocks=state.blocks + 1,
        sum_u=state.sum_u + u,
        sum_s=state.sum_s + s,
        sum_uu=state.sum_uu + u * u,
        sum_us=state.sum_us + u * s,
        sum_ss=state.sum_ss + s * s,
    )
    is_hopeless = state.home >= 0 and state.sum_u / state.sum_s < (1.0 - HOPELESS) * state.home_rate
    if state.blocks % BLOCKS and not is_hopeless:
        return state, None
    return _compared(state, _score(state), settings) if state.home >= 0 else _at_home(state, _score(state), settings)


def _at_home(state: LagState, score: _Score, settings: LagSettings) -> tuple[LagState, Decision]:
    """Nothing is being tried: wait, or try a neighbour."""
    if state.wait > 0:
        left = state.wait - 1
        state = replace(_shortened(state), wait=left)
        return state, Decision(state.bound, f"stays: {_rate(score)}, next try after {left} more")
    direction, reach = state.direction, _reach(state)
    neighbour = _rung(state.bound, direction * reach, settings)
    if neighbour == state.bound:
        direction = -direction
        neighbour = _rung(state.bound, direction * reach, settings)
    if neighbour == state.bound:
        return _shortened(state), Decision(state.bound, "stays: floor and ceiling leave no choice")
    tried = replace(
        _moved(state, neighbour),
        home=state.bound,
        home_rate=score.rate,
        home_error=score.error,
        direction=direction,
    )
    return tried, Decision(neighbour, f"tries {neighbour}: {state.bound} gives {_rate(score)}")


def _compared(state: LagState, score: _Score, settings: LagSettings) -> tuple[LagState, Decision | None]:
    """A neighbour has been measured: keep it, go back, or measure it for longer."""
    before = _Score(state.home_rate, state.home_error)
    gain = (score.rate - before.rate) / before.rate if before.rate > 0.0 else math.inf if score.rate > 0.0 else 0.0
    noise = math.hypot(score.error, before.error) * ERRORS / before.rate if before.rate > 0.0 else 0.0
    is_hidden = abs(gain) < noise and noise > settings.least_gain
    if is_hidden and state.blocks < LONGEST_WINDOW:
        return state, None
    is_younger = state.bound < state.home
    is_kept = gain >= min(0.0, noise - settings.least_gain) if is_younger else gain > max(settings.least_gain, noise)
    seen = f"{state.bound} gives {_rate(score)}, {gain:+.1%} (noise {noise:.1%}) over {state.home}"
    if is_kept:
        next_rung = _rung(state.bound, state.direction * _reach(state), settings)
        if next_rung == state.bound:
            kept = replace(_shortened(state), home=-1, wait=1, direction=-state.direction)
            kept = replace(kept, failures=state.failures // 2)
            return kept, Decision(state.bound, f"keeps {state.bound}, the last: {seen}")
        # The best of the way down stays the measure, or many small losses would add up unseen.
        measure = before if is_younger and before.rate > score.rate else score
        tried = replace(
            _moved(state, next_rung),
            home=state.bound,
            home_rate=measure.rate,
            home_error=measure.error,
            failures=state.failures // 2,
        )
        return tried, Decision(next_rung, f"keeps {state.bound} and tries {next_rung}: {seen}")
    failures = min(state.failures + 1, 99)
    back = replace(
        _moved(state, state.home),
        home=-1,
        direction=-state.direction,
        failures=failures,
        wait=min(LONGEST_WAIT, int(2 ** (failures // 2)) - 1),
    )
    return back, Decision(state.home, f"goes back to {state.home}: {seen}")


def _moved(state: LagState, bound: int) -> LagState:
    """Under the new bound no measurement counts before the last sample that was admitted under the old one is gone."""
    return replace(_emptied(state), bound=bound, settling=max(state.bound, bound) + 1)


def _shortened(state: LagState) -> LagState:
    """A window that has become long loses half of its weight, so that what was long ago is forgotten."""
    if state.blocks < LONGEST_WINDOW:
        return state
    half = state.blocks // (2 * BLOCKS) * BLOCKS
    share = half / state.blocks
    return replace(
        state,
        blocks=half,
        sum_u=state.sum_u * share,
        sum_s=state.sum_s * share,
        sum_uu=state.sum_uu * share,
        sum_us=state.sum_us * share,
        sum_ss=state.sum_ss * share,
    )


def _emptied(state: LagState) -> LagState:
    return replace(
        state, count=0, block_u=0.0, block_s=0.0, blocks=0, sum_u=0.0, sum_s=0.0, sum_uu=0.0, sum_us=0.0, sum_ss=0.0
    )


def _score(state: LagState) -> _Score:
    """Ratio of sums, with the standard error of a ratio estimator (Cochran, Sampling Techniques, 3rd ed., ch. 6)."""
    rate = state.sum_u / state.sum_s
    residuals = max(0.0, state.sum_uu - 2.0 * rate * state.sum_us + rate * rate * state.sum_ss)
    count = state.blocks
    return _Score(rate, math.sqrt(residuals * count / max(1, count - 1)) / state.sum_s)


def _reach(state: LagState) -> int:
    return min(LONGEST_REACH, 1 + state.failures // 2)


def _rung(bound: int, distance: int, settings: LagSettings) -> int:
    """So many rungs up or down from `bound`, as far as there are any."""
    rungs = _rungs(settings)
    return rungs[max(0, min(bisect_left(rungs, bound) + distance, len(rungs) - 1))]


def _rungs(settings: LagSettings) -> list[int]:
    """0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, ... inside of the limits, which are rungs too."""
    inner = {0, *(odd * 2**power for odd in (1, 3, 5) for power in range(settings.ceiling.bit_length() + 1))}
    return sorted({_clamped(rung, settings) for rung in inner})


def _clamped(bound: int, settings: LagSettings) -> int:
    return max(settings.floor, min(bound, settings.ceiling))


def _rate(score: _Score) -> str:
    return f"{score.rate:,.4g} ± {score.error:.2g} useful tokens/s"
