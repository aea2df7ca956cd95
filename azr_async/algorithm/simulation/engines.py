"""Simulated inference workers: what waits, what runs, which weights they have."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final, Generic, TypeVar

import simpy

from azr_async.algorithm.simulation.cores import Cores, Process
from azr_async.algorithm.simulation.model import CellLoad, Machine, Outcome
from azr_async.messages import Cell

CHUNKS: Final = 16
"""An engine's steps are taken together, about so many times in a completion of mean length."""

Group = TypeVar("Group")


@dataclass(slots=True)
class Sample(Generic[Group]):
    """A completion that is asked for, being generated or done."""

    group: Group
    cell: Cell
    tokens_left: int
    length: int
    version: int = -1
    """Of its first token."""


class Engines(Generic[Group]):
    """Continuous batching: rows leave when they end, new ones join when a few are free; old groups go first.

    Weights are put into place between two steps. All engines take from one queue, a sample at a time.
    """

    def __init__(
        self,
        env: simpy.Environment,
        cores: Cores,
        machine: Machine,
        outcome: Outcome,
        *,
        mean_tokens: float,
        seed: int,
        on_done: Callable[[Sample[Group]], Process],
    ) -> None:
        self._env, self._cores, self._machine, self._outcome, self._on_done = env, cores, machine, outcome, on_done
        self._random, self._numbers = random.Random(seed), count()
        self._chunk_tokens = max(1, int(mean_tokens / CHUNKS))
        self._waiting: list[tuple[int, int, Sample[Group]]] = []
        self._newest = 0
        self._installed = [0] * machine.engines
        self._has_work, self._has_installed = env.event(), env.event()
        for number in range(machine.engines):
            env.process(self._engine(number))

    def submit(self, group: Group, cell: Cell, load: CellLoad, *, samples: int, priority: int) -> None:
        """Ask for completions; their lengths are drawn here."""
        for _ in range(samples):
            length = max(1, round(self._random.gauss(load.tokens, load.tokens_std)))
            heapq.heappush(self._waiting, (priority, next(self._numbers), Sample(group, cell, length, length)))
        self._wake()

    def install(self, version: int) -> Process:
        """Until every engine samples with it."""
        self._newest = version
        self._wake()
        while min(self._installed) < version:
            yield self._has_installed

    def _wake(self) -> None:
        self._has_work.succeed()
        self._has_work = self._env.event()

    def _engine(self, number: int) -> Process:
        machine, running, version = self._machine, list[Sample[Group]](), 0
        while True:
            if version < self._newest:
                newest = self._newest
                yield from self._compute(machine.pause_seconds)
                version = self._installed[number] = newest
                self._has_installed.succeed()
                self._has_installed = self._env.event()
            free = machine.slots - len(running)
            if self._waiting and free >= max(1, machine.slots // 16):
                joined = [heapq.heappop(self._waiting)[2] for _ in range(min(free, len(self._waiting)))]
                prompts = len({id(sample.group) for sample in joined})
                yield from self._compute(machine.prefill_seconds + machine.prompt_seconds * prompts)
                for sample in joined:
                    sample.version = version
                running += joined
            if running:
                tokens = min(self._chunk_tokens, *(sample.tokens_left for sample in running))
                yield from self._compute(tokens * (machine.step_seconds + machine.row_seconds * len(running)))
                running = self._left_after(tokens, running)
            elif version == self._newest and not self._waiting:
                yield self._has_work

    def _left_after(self, tokens: int, running: list[Sample[Group]]) -> list[Sample[Group]]:
        for sample in running:
            sample.tokens_left -= tokens
            if sample.tokens_left == 0:
                self._env.process(self._on_done(sample))
        return [sample for sample in running if sample.tokens_left > 0]

    def _compute(self, seconds: float) -> Process:
        began = self._env.now
        yield self._cores.work(seconds)
        self._outcome.busy_seconds["inference"] += self._env.now - began
