"""Processor sharing: jobs that compute at the same time divide the cores evenly, none gets more than one."""

import heapq
from collections.abc import Generator
from itertools import count
from typing import Any

import simpy

Process = Generator[simpy.Event, Any, None]


class Cores:
    """Cores of a simulated machine. Without a number of them, every job has a device of its own.

    All jobs advance at the same rate, so one clock that runs at this rate tells when each of them is done.
    """

    def __init__(self, env: simpy.Environment, cores: float | None) -> None:
        self._env, self._cores = env, cores
        self._jobs: list[tuple[float, int, simpy.Event]] = []
        self._numbers = count()
        self._progress = self._since = 0.0
        self._changes = 0

    def work(self, seconds: float) -> simpy.Event:
        """Happens when so many CPU seconds have been done."""
        if self._cores is None:
            return self._env.timeout(seconds)
        self._advance()
        done = self._env.event()
        heapq.heappush(self._jobs, (self._progress + seconds, next(self._numbers), done))
        self._plan()
        return done

    def _rate(self) -> float:
        return 1.0 if self._cores is None else min(1.0, self._cores / max(1, len(self._jobs)))

    def _advance(self) -> None:
        self._progress += (self._env.now - self._since) * self._rate()
        self._since = self._env.now

    def _plan(self) -> None:
        """Wake up when the next job is done, if nothing changes until then."""
        self._changes += 1
        if self._jobs:
            self._env.process(self._wake(max(0.0, self._jobs[0][0] - self._progress) / self._rate(), self._changes))

    def _wake(self, after_seconds: float, change: int) -> Process:
        yield self._env.timeout(after_seconds)
        if change != self._changes:
            return
        self._advance()
        self._progress = max(self._progress, self._jobs[0][0])  # what rounding has left
        while self._jobs and self._jobs[0][0] <= self._progress:
            heapq.heappop(self._jobs)[2].succeed()
        self._plan()
