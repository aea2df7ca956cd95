"""What became of a run, from what was seen outside of it. Pure.

A child's claim is taken only from a well-formed frame, and only as data: its value is decoded with limits and written
anew. A process that did not end by itself with exit status 0 gets a verdict instead, for the input that it was at.
"""

import os
import signal
from dataclasses import dataclass
from typing import Final

from azr_async.algorithm.values import read
from azr_async.messages import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use on one input."""

    wall_seconds: float
    cpu_seconds: int
    result_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How a child ended, as the zygote and the pool saw it."""

    content: bytes
    """What it wrote: frames, perhaps."""
    is_over_limit: bool
    """It wrote more than its results may take; nobody read on, so that it could not end before its deadline."""
    was_killed: bool
    """At its wall deadline."""
    wait_status: int
    cpu_seconds: float
    wall_ms: float

    @property
    def was_forced(self) -> bool:
        """It did not end by itself."""
        return self.was_killed or os.WIFSIGNALED(self.wait_status)


LOST: Final = Outcome(status="error", error="the process that ran it died, several times")
"""Says nothing about the program."""


def outcomes_of(report: Report, count: int, limits: Limits) -> list[Outcome]:
    """The outcomes of the first inputs of a child that was given `count` >= 1 inputs; at least one, in order.

    Limits are those of one input. So where the child ended early, the input that it was at gets a verdict only if it
    was the first: a later one may have suffered from what those before it used up, and is to be run again, first in a
    child of its own. The same holds for a later one that says it found no memory.
    """
    frames = _frames(report.content)
    wall_ms = report.wall_ms / max(len(frames), 1)
    if not _ended_well(report) or len(frames) != count:
        frames = [] if report.is_over_limit else frames[: count - 1]
    short_of_memory = (place for place, frame in enumerate(frames) if place and frame[:1] == b"M")
    frames = frames[: next(short_of_memory, len(frames))]
    return [_outcome(frame, wall_ms) for frame in frames] or [_verdict(report, limits.cpu_seconds)]


def _ended_well(report: Report) -> bool:
    return not report.was_killed and not report.is_over_limit and report.wait_status == 0


def _frames(content: bytes) -> list[bytes]:
    """The complete frames; a tail that is no frame is dropped."""
    frames = []
    start = 0
    while start + 4 <= len(content):
        end = start + 4 + int.from_bytes(content[start : start + 4], "little")
        if end > len(content):
            break
        frames.append(content[start + 4 : end])
        start = end
    return frames


def _outcome(frame: bytes, wall_ms: float) -> Outcome:
    kind, content = frame[:1], frame[1:].decode("utf-8", "replace")
    if kind == b"V":
        try:
            canonical, literal = read(content)
        except (ValueError, RecursionError):
            return Outcome(status="error", error="the result is malformed", wall_ms=wall_ms)
        return Outcome(status="ok", value=canonical, text=literal, wall_ms=wall_ms)
    if kind == b"E":
        return Outcome(status="error", error=content[:200], wall_ms=wall_ms)
    if kind == b"M":
        return Outcome(status="memory", error="out of memory", wall_ms=wall_ms)
    if kind == b"L":
        return Outcome(status="output_too_long", error=content[:200], wall_ms=wall_ms)
    return Outcome(status="error", error="the result is malformed", wall_ms=wall_ms)


def _verdict(report: Report, cpu_limit_seconds: int) -> Outcome:
    wall_ms = report.wall_ms
    if report.is_over_limit:
        return Outcome(status="output_too_long", error="wrote more than a result may take", wall_ms=wall_ms)
    if report.was_killed:
        return Outcome(status="timeout", error="wall time", wall_ms=wall_ms)
    if os.WIFSIGNALED(report.wait_status):
        number = os.WTERMSIG(report.wait_status)
        if number == signal.SIGSYS:
            return Outcome(status="blocked", error="forbidden system call", wall_ms=wall_ms)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and report.cpu_seconds >= 0.9 * cpu_limit_seconds):
            return Outcome(status="timeout", error="CPU time", wall_ms=wall_ms)
        if number == signal.SIGKILL:
            return Outcome(status="memory", error="killed", wall_ms=wall_ms)
        return Outcome(status="error", error=f"died of signal {number}", wall_ms=wall_ms)
    return Outcome(status="error", error="ended without a result", wall_ms=wall_ms)


def agreed(first: Outcome, second: Outcome) -> Outcome:
    """The verdict on two runs of one program on one input, in differently seeded processes."""
    if LOST in (first, second):
        return LOST
    if second.status in ("timeout", "memory"):
        return second  # near its limit: it stays on the safe side of it in every run, or it is over
    if first.status != second.status:
        return Outcome(
            status="nondeterministic", error=f"{first.status} once, then {second.status}", wall_ms=first.wall_ms
        )
    if first.value != second.value:
        return Outcome(status="nondeterministic", error="two different values", wall_ms=first.wall_ms)
    return first
