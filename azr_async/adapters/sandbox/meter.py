"""What the sandbox did so far, in numbers."""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from azr_async.messages import Outcome

LATENCIES_KEPT: Final = 4096


class Meter:
    """Counts outcomes, forks and time; read at any moment."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        """Outcomes of program and input by status, remembered ones not counted."""
        self.limits: Counter[str] = Counter()
        """Those of them that met a limit, by limit."""
        self.remembered = 0
        """Outcomes that were answered from memory."""
        self.forks = 0
        self.kills = 0
        """Programs that did not end by themselves: killed at a limit of time, by the filter, for want of memory."""
        self.waiting = 0
        """Programs that wait for a free process now."""
        self._running = 0
        self._busy_seconds = 0.0
        self._since = time.monotonic()
        self._wall_ms: deque[float] = deque(maxlen=LATENCIES_KEPT)

    @property
    def busy_seconds(self) -> float:
        """Wall time in which a program was running, added up over programs running side by side."""
        return self._busy_seconds + self._running * (time.monotonic() - self._since)

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Around the wait for a free process."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around one fork."""
        self.forks += 1
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def count(self, outcome: Outcome) -> None:
        """Take note of a new outcome."""
        self.statuses[outcome.status] += 1
        if outcome.limit:
            self.limits[outcome.limit] += 1
        if outcome.wall_ms > 0.0:  # it came to run
            self._wall_ms.append(outcome.wall_ms)

    def latency_ms(self, *percentiles: int) -> dict[int, float]:
        """Wall milliseconds per execution, over the last few thousand; empty before the first."""
        ordered = sorted(self._wall_ms)
        return {p: ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in percentiles if ordered}

    def forget_latencies(self) -> None:
        """Start `latency_ms` anew."""
        self._wall_ms.clear()

    def _change(self, by: int) -> None:
        now = time.monotonic()
        self._busy_seconds += self._running * (now - self._since)
        self._since = now
        self._running += by
