"""What became of a run, from what was seen outside of it. Pure.

A child's claim is taken only from a well-formed frame, and only as data: its value is decoded with limits and written
anew. A process that did not end by itself with exit status 0 gets a verdict instead, for the input that it was at.
"""

import os
import signal
from dataclasses import dataclass
from typing import Final

from azr_async.adapters.sandbox.inside.wire import NOTE
from azr_async.algorithm.values import read
from azr_async.messages import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use on one input."""

    wall_seconds: float
    cpu_seconds: int
    result_bytes: int
    memory_mb: int


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
    peak_kib: int
    """Most memory that it had in use at once, beyond what its zygote had before it confined itself."""
    wall_ms: float

    @property
    def was_forced(self) -> bool:
        """It did not end by itself."""
        return self.was_killed or os.WIFSIGNALED(self.wait_status)


KILLED: Final = Outcome(status="lost", error="killed from outside, below all limits of its own")
"""By the kernel, which wanted memory, or by somebody: behind the wall no program can send itself a signal."""
KILLED_LARGE: Final = Outcome(status="memory", limit="memory", error="killed, each time")
"""The same with so much of its memory in use that it may be why. Once says nothing, so it is run again; who ends like
this every time is charged with it: otherwise a program could have itself lost at will."""
OWN_SHARE: Final = 0.9
"""Of a limit: whoever is killed beyond it has come to its end by itself."""
LARGE_SHARE: Final = 0.5
"""Of the limit of memory, for `KILLED_LARGE`."""


def lost(reason: str) -> Outcome:
    """Says nothing about the program."""
    return Outcome(status="lost", error=f"no process could run it, several times: {reason}"[:200])


def outcomes_of(report: Report, count: int, limits: Limits) -> list[Outcome]:
    """The outcomes of the first inputs of a child that was given `count` >= 1 inputs; at least one, in order.

    Limits are those of one input. So where the child ended early, the input that it was at gets a verdict only if it
    was the first: a later one may have suffered from what those before it used up, and is to be run again, first in a
    child of its own. The same holds for a later one that says it found no memory.
    """
    frames = _frames(report.content)
    has_started_others = frames[-1:] == [NOTE]
    frames = [frame for frame in frames if frame != NOTE]
    wall_ms = report.wall_ms / max(len(frames), 1)
    if not _ended_well(report) or len(frames) != count:
        frames = [] if report.is_over_limit else frames[: count - 1]
    short_of_memory = (place for place, frame in enumerate(frames) if place and frame[:1] == b"M")
    frames = frames[: next(short_of_memory, len(frames))]
    return [_outcome(frame, wall_ms) for frame in frames] or [_verdict(report, limits, has_started_others)]


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
    if kind == b"F":
        return Outcome(status="error", limit="files", error=content[:200], wall_ms=wall_ms)
    if kind == b"M":
        return Outcome(status="memory", limit="memory", error="out of memory", wall_ms=wall_ms)
    if kind == b"L":
        return Outcome(status="output_too_long", limit="output", error=content[:200], wall_ms=wall_ms)
    return Outcome(status="error", error="the result is malformed", wall_ms=wall_ms)


def _verdict(report: Report, limits: Limits, has_started_others: bool) -> Outcome:
    if report.is_over_limit:
        error = "wrote more than a result may take"
        return Outcome(status="output_too_long", limit="output", error=error, wall_ms=report.wall_ms)
    if report.was_killed:
        return Outcome(status="timeout", limit="wall", error="wall time", wall_ms=report.wall_ms)
    if os.WIFSIGNALED(report.wait_status):
        return _death(os.WTERMSIG(report.wait_status), report, limits, has_started_others)
    return Outcome(status="error", error="ended without a result", wall_ms=report.wall_ms)


def _death(number: int, report: Report, limits: Limits, has_started_others: bool) -> Outcome:
    wall_ms = report.wall_ms
    if number == signal.SIGSYS and has_started_others:
        return Outcome(status="blocked", limit="processes", error="a process or thread", wall_ms=wall_ms)
    if number == signal.SIGSYS:
        return Outcome(status="blocked", limit="calls", error="forbidden system call", wall_ms=wall_ms)
    is_killed = number == signal.SIGKILL
    if number == signal.SIGXCPU or (is_killed and report.cpu_seconds >= OWN_SHARE * limits.cpu_seconds):
        return Outcome(status="timeout", limit="cpu", error="CPU time", wall_ms=wall_ms)
    if not is_killed:
        return Outcome(status="error", error=f"died of signal {number}", wall_ms=wall_ms)
    memory_share = report.peak_kib / (limits.memory_mb * 1024)
    if memory_share >= OWN_SHARE:
        return Outcome(status="memory", limit="memory", error="killed at its limit of memory", wall_ms=wall_ms)
    return KILLED_LARGE if memory_share >= LARGE_SHARE else KILLED


def agreed(first: Outcome, second: Outcome) -> Outcome:
    """The verdict on two runs of one program on one input, in differently seeded processes."""
    if "lost" in (first.status, second.status):
        return first if first.status == "lost" else second
    if second.status in ("timeout", "memory"):
        return second  # near its limit: it stays on the safe side of it in every run, or it is over
    if first.status != second.status:
        return Outcome(
            status="nondeterministic", error=f"{first.status} once, then {second.status}", wall_ms=first.wall_ms
        )
    if first.value != second.value:
        return Outcome(status="nondeterministic", error="two different values", wall_ms=first.wall_ms)
    return first
