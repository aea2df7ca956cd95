"""The valid tasks that self-play has found: bounded, without duplicates, deterministic given a seed.

The proposer's references and the solver's top-up tasks are drawn from here, uniformly (paper,
section 3.3.2) and without replacement. The published code keeps the oldest tasks when its buffer is full;
ours lets go of those that were drawn most often, oldest first, and never of the newest.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from azr_async.algorithm.values import encode
from azr_async.messages import TASKS, Pair, Problem, Task

IDENTITY_PROGRAM: Final = "def f(x):\n    return x"


def identity_problem(task: Task) -> Problem:
    """The single triplet that self-play starts from: the identity function on "Hello World" (paper, Figure 5)."""
    text = "Hello World"
    pair = Pair(input=repr(text), output=repr(text), value=encode(text))
    return Problem(task=task, program=IDENTITY_PROGRAM, pairs=(pair,))


@dataclass(slots=True)
class _Entry:
    problem: Problem
    number: int
    draws: int = 0


@dataclass(slots=True)
class Library:
    """Tasks by kind."""

    capacity: int
    seed: int
    _entries: dict[Task, list[_Entry]] = field(default_factory=lambda: {task: [] for task in TASKS})
    _keys: set[tuple[str, str, str]] = field(default_factory=set)
    _returned: dict[Task, list[Problem]] = field(default_factory=lambda: {task: [] for task in TASKS})
    _count: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        for task in ("deduction", "abduction"):
            self.add(identity_problem(task))

    def add(self, problem: Problem) -> bool:
        """Keep a valid task; False when it is known already."""
        if problem.key in self._keys:
            return False
        self._keys.add(problem.key)
        entries = self._entries[problem.task]
        entries.append(_Entry(problem, self._count))
        self._count += 1
        if len(entries) > self.capacity:
            gone = max(entries[:-1], key=lambda entry: (entry.draws, -entry.number), default=entries[0])
            self._remove(gone)
        return True

    def discard(self, problem: Problem) -> None:
        """Let go of a task that turned out to be unusable."""
        for entry in self._entries[problem.task]:
            if entry.problem.key == problem.key:
                self._remove(entry)
                return

    def references(self, task: Task, count: int) -> tuple[Problem, ...]:
        """K solved tasks to show to a proposer; for induction one program to find inputs for, from the other kinds."""
        if task == "induction":
            return tuple(self._draw(self._entries["deduction"] + self._entries["abduction"], 1))
        return tuple(self._draw(self._entries[task], count))

    def task(self, task: Task) -> Problem:
        """One task to solve again: those given back by `give_back` first."""
        if self._returned[task]:
            return self._returned[task].pop(0)
        return self._draw(self._entries[task], 1)[0]

    def give_back(self, problem: Problem) -> None:
        """A task whose attempts were dropped as too old: it is drawn next."""
        self._returned[problem.task].append(problem)

    def sizes(self) -> dict[Task, int]:
        """How many tasks of each kind there are."""
        return {task: len(entries) for task, entries in self._entries.items()}

    def solvable(self) -> Collection[Task]:
        """Kinds of which there is at least one task."""
        return [task for task, entries in self._entries.items() if entries]

    def _draw(self, entries: list[_Entry], count: int) -> list[Problem]:
        drawn = self._random.sample(entries, min(count, len(entries)))
        for entry in drawn:
            entry.draws += 1
        return [entry.problem for entry in drawn]

    def _remove(self, entry: _Entry) -> None:
        self._entries[entry.problem.task].remove(entry)
        self._keys.discard(entry.problem.key)
