"""The valid tasks that self-play has found: bounded, without duplicates, deterministic given a seed.

The proposer's references and the solver's top-up tasks are drawn from here, uniformly (paper,
section 3.3.2) and without replacement. The published code keeps the oldest tasks when its buffer is full;
ours lets go of those that teach least, and never of the newest.

From the first `settle` on, what happens between two of them (tasks found, draws, results) only counts after the next.
So what is drawn depends on the weights' version and the number of the draw, not on who was quicker in between.
"""

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from azr_async.algorithm.validity import program_key
from azr_async.algorithm.values import encode
from azr_async.messages import TASKS, Pair, Problem, Task

IDENTITY_PROGRAM: Final = "def f(x):\n    return x"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskUse:
    """What has been made of a task so far."""

    draws: int = 0
    """Times it was shown to a proposer, or asked again."""
    attempts: int = 0
    successes: int = 0
    reward: float | None = None
    """Of its proposer."""
    last_use: int | None = None
    """Newest weights when it was drawn or attempted last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownTask:
    """A task of the library as it stands between two versions."""

    problem: Problem
    use: TaskUse


def identity_problem(task: Task) -> Problem:
    """The single triplet that self-play starts from: the identity function on "Hello World" (paper, Figure 5)."""
    text = "Hello World"
    pair = Pair(input=repr(text), output=repr(text), value=encode(text))
    return Problem(task=task, program=IDENTITY_PROGRAM, pairs=(pair,))


def task_key(problem: Problem) -> bytes:
    """16 bytes: equal for tasks of one kind with the same canonical program and the same inputs."""
    return key_of(problem.task, problem.program, [pair.input for pair in problem.pairs])


def key_of(task: str, program: str, inputs: Sequence[str]) -> bytes:
    """`task_key` of its parts."""
    content = json.dumps([task, program_key(program), [text.strip() for text in inputs]])
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def usefulness(use: TaskUse, *, age: float) -> float:
    """What a task still teaches: most when half of the attempts succeed, less the more often it was used.

    `p (1 - p) / ((1 + draws) (1 + age))` with p = (successes + 1) / (attempts + 2); untried tasks count as learnable.

    Args:
        use: what has been made of it.
        age: 0 for the newest task of a full library, 1 for the oldest.
    """
    share = (use.successes + 1) / (use.attempts + 2)
    return share * (1 - share) / ((1 + use.draws) * (1 + age))


@dataclass(slots=True)
class _Entry:
    problem: Problem
    key: bytes
    group_id: int
    use: TaskUse = field(default_factory=TaskUse)


@dataclass(slots=True)
class Library:
    """Tasks by kind."""

    capacity: int
    seed: int
    _entries: dict[Task, list[_Entry]] = field(default_factory=lambda: {task: [] for task in TASKS})
    _found: dict[Task, list[_Entry]] = field(default_factory=lambda: {task: [] for task in TASKS})
    """Since the last `settle`."""
    _by_key: dict[bytes, _Entry] = field(default_factory=dict)
    _new_use: dict[bytes, TaskUse] = field(default_factory=dict)
    """Since the last `settle`, to be added."""
    _expected: dict[int, list[tuple[Problem, int]]] = field(default_factory=dict)
    """By version: found by an earlier process after the checkpoint that its run is resumed at."""
    _returned: dict[Task, list[Problem]] = field(default_factory=lambda: {task: [] for task in TASKS})
    _draws: int = 0
    _waits: bool = False

    def __post_init__(self) -> None:
        for task in ("deduction", "abduction"):
            self.add(identity_problem(task))

    @classmethod
    def restored(cls, known: Iterable[KnownTask], *, capacity: int, seed: int) -> Self:
        """A library as it was, when `known` was what it knew."""
        library = cls(capacity=capacity, seed=seed)
        for task in ("deduction", "abduction"):
            library.discard(identity_problem(task))
        for item in known:
            library.add(item.problem, use=item.use)
        return library

    def add(self, problem: Problem, *, group_id: int = 0, use: TaskUse | None = None) -> bool:
        """Keep a valid task that group `group_id` has found; False when it is known already."""
        key = task_key(problem)
        known = self._by_key.get(key)
        if known is not None:
            known.group_id = min(known.group_id, group_id)  # whoever was quicker: it stands in the same place
            return False
        entry = self._by_key[key] = _Entry(problem, key, group_id, use or TaskUse())
        if self._waits:
            self._found[problem.task].append(entry)
        else:
            self._entries[problem.task].append(entry)
            self._make_room(problem.task)
        return True

    def expect(self, problem: Problem, *, group_id: int, version: int) -> None:
        """Keep what an earlier process has found under weights of `version`, from the time when it did: none is lost,
        and none is known too early."""
        self._expected.setdefault(version, []).append((problem, group_id))

    def settle(self, version: int) -> list[KnownTask]:
        """Weights of `version` are everywhere: what was found and done under older ones counts from now on.

        Returns the tasks that have been used since, as they stand now.
        """
        self._waits = True
        changed = []
        for key, new in self._new_use.items():
            if (entry := self._by_key.get(key)) is not None:
                entry.use = _sum(entry.use, new, last_use=max(0, version - 1))
                changed.append(KnownTask(problem=entry.problem, use=entry.use))
        self._new_use.clear()
        for past in [past for past in self._expected if past < version]:
            for problem, group_id in self._expected.pop(past):
                self.add(problem, group_id=group_id)
        for task, found in self._found.items():
            self._entries[task] += sorted(found, key=lambda entry: (entry.group_id, entry.key))
            found.clear()
            self._make_room(task)
        return changed

    def discard(self, problem: Problem) -> None:
        """Let go of a task that turned out to be unusable."""
        entry = self._by_key.pop(task_key(problem), None)
        if entry is not None:
            kept = self._entries[problem.task] if entry in self._entries[problem.task] else self._found[problem.task]
            kept.remove(entry)

    def references(self, task: Task, count: int, *, draw: int | None = None) -> tuple[Problem, ...]:
        """K solved tasks to show to a proposer; for induction one program to find inputs for, from the other kinds.

        Between two calls of `settle`, equal numbers `draw` give equal tasks. Without a number each draw is another one.
        """
        if task == "induction":
            return tuple(self._draw("references", self._pool("deduction") + self._pool("abduction"), 1, draw))
        return tuple(self._draw("references", self._pool(task), count, draw))

    def task(self, task: Task, *, draw: int | None = None) -> Problem:
        """One task to solve again: those given back by `give_back` first. `draw` as in `references`."""
        if self._returned[task]:
            return self._returned[task].pop(0)
        return self._draw("task", self._pool(task), 1, draw)[0]

    def give_back(self, problem: Problem) -> None:
        """A task whose attempts were dropped as too old: it is drawn next."""
        self._returned[problem.task].append(problem)

    def note_result(self, problem: Problem, *, attempts: int, successes: int, reward: float | None = None) -> None:
        """Somebody has attempted a task; `reward` is that of its proposer, when it was new."""
        self._note(task_key(problem), TaskUse(attempts=attempts, successes=successes, reward=reward))

    def sizes(self) -> dict[Task, int]:
        """How many tasks of each kind there are."""
        return {task: len(entries) + len(self._found[task]) for task, entries in self._entries.items()}

    def solvable(self) -> Collection[Task]:
        """Kinds of which there is at least one task."""
        return [task for task, size in self.sizes().items() if size]

    def known(self) -> list[KnownTask]:
        """What was here after the last `settle`, in its order."""
        return [KnownTask(problem=entry.problem, use=entry.use) for task in TASKS for entry in self._entries[task]]

    def uses(self) -> dict[bytes, TaskUse]:
        """The same by key, without the tasks themselves."""
        return {entry.key: entry.use for task in TASKS for entry in self._entries[task]}

    def _pool(self, task: Task) -> list[_Entry]:
        """What may be drawn; the first tasks of a kind are not kept waiting for."""
        return self._entries[task] or self._found[task]

    def _draw(self, purpose: str, entries: list[_Entry], count: int, draw: int | None) -> list[Problem]:
        if draw is None:
            self._draws += 1
        chance = random.Random(f"{self.seed} {purpose} {f'draw {self._draws}' if draw is None else draw}")
        drawn = chance.sample(entries, min(count, len(entries)))
        for entry in drawn:
            self._note(entry.key, TaskUse(draws=1))
        return [entry.problem for entry in drawn]

    def _note(self, key: bytes, new: TaskUse) -> None:
        if self._waits:
            self._new_use[key] = _sum(self._new_use.get(key, TaskUse()), new)
        elif (entry := self._by_key.get(key)) is not None:
            entry.use = _sum(entry.use, new)

    def _make_room(self, task: Task) -> None:
        """Let go of what teaches least, oldest first; a little more than must be, for it means looking at all."""
        entries = self._entries[task]
        if len(entries) <= self.capacity:
            return
        worth = [
            (usefulness(entry.use, age=1 - place / len(entries)), place) for place, entry in enumerate(entries[:-1])
        ]
        gone = {place for _, place in sorted(worth)[: len(entries) - self.capacity + self.capacity // 16]}
        for place in gone:
            del self._by_key[entries[place].key]
        self._entries[task] = [entry for place, entry in enumerate(entries) if place not in gone]


def _sum(before: TaskUse, new: TaskUse, *, last_use: int | None = None) -> TaskUse:
    return TaskUse(
        draws=before.draws + new.draws,
        attempts=before.attempts + new.attempts,
        successes=before.successes + new.successes,
        reward=before.reward if new.reward is None else new.reward,
        last_use=before.last_use if last_use is None else last_use,
    )
