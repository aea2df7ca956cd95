"""How long an engine was busy."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall time in which at least one of many overlapping things was going on."""

    def __init__(self) -> None:
        self._total_seconds = 0.0
        self._running = 0
        self._is_held = False
        self._since_seconds = 0.0

    def seconds(self) -> float:
        """Total so far."""
        going_on = time.perf_counter() - self._since_seconds if self._running and not self._is_held else 0.0
        return self._total_seconds + going_on

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing counts inside of the block."""
        self._stop()
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._since_seconds = time.perf_counter()

    def _stop(self) -> None:
        self._total_seconds = self.seconds()
        self._since_seconds = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """One thing goes on inside of the block."""
        self._stop()
        self._running += 1
        try:
            yield
        finally:
            self._stop()
            self._running -= 1
