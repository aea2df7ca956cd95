"""How much work may be alive, and how old a token can then be. All version arithmetic is here.

Version = number of batches that the weights were trained on: optimizer steps, with one mini-batch each.
A sample of the batch that turns version v into v + 1 has `lag = v - (version of its oldest trained token)`.

Why the bound holds without waste. Each (role, task) cell of batch size b owns (max_lag + 1) b slots.
A slot is charged when a sample is admitted and comes back when weights that contain the sample have
reached every engine (or at once, when the sample turns out not to exist). A sample that is admitted under
version u is due at u + max_lag: it must be in that batch at the latest. Let due(w) count those that are due
at w or before and in no batch yet. The slots keep

    due(w) <= (w - v + 1) b    for every w >= v, whenever batch v is composed;

and batch v may go only if it leaves at most (w - v) b of them for each w, which keeps the inequality for
v + 1. Where it would leave more, because too many of the due are still being generated, it waits for them.
So every sample is trained within its bound and none is dropped. `late = "drop"` does not wait, and sweeps
what has become too old. (A solver cell that was excused from a batch has consumed nothing, so the inequality
is not kept there: it may drop.)

The bound may change at any moment, because a sample keeps the one that it was admitted under: docs/staleness.md.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple

from azr_async.errors import TrainingError
from azr_async.messages import CELLS, TASKS, Admission, Cell, Role, Rollout, Task

GroupKind = tuple[Task, bool]
"""Task and `is_proposal`."""
_GROUP_KINDS: Final = [(task, is_proposal) for task in TASKS for is_proposal in (True, False)]


def lag_of(rollout: Rollout, version: int) -> int:
    """Age in optimizer steps of the oldest trained token, when weights of `version` are trained on it."""
    return version - rollout.oldest_version


def check_lag(rollouts: Iterable[Rollout], *, version: int, max_lag: int) -> None:
    """Raise TrainingError when any trained token is older than the bound, or younger than possible."""
    for rollout in rollouts:
        lag = lag_of(rollout, version)
        newest = int(rollout.token_version.max())
        if lag > max_lag or newest > version:
            raise TrainingError(
                f"rollout {rollout.rollout_id} of group {rollout.group_id} has tokens of versions "
                f"{rollout.oldest_version}..{newest}, but the batch trains version {version} with max_lag = {max_lag}. "
                "This is a bug in the bookkeeping: keep the run directory and report it."
            )


class _Flying(NamedTuple):
    """Samples of a group that are being generated."""

    samples: int
    version: int
    """At admission."""
    max_lag: int
    """At admission."""

    @property
    def due(self) -> int:
        """Last batch that may contain them. Their tokens may turn out younger, and they due later."""
        return self.version + self.max_lag


class _Ready(NamedTuple):
    """A sample that waits for a batch; those that are due first come first."""

    due: int
    group_id: int
    max_lag: int
    """At admission."""
    rollout: Rollout


@dataclass(slots=True)
class _CellState:
    """One (role, task) cell: where each of its slots is."""

    batch: int
    flying: dict[int, _Flying] = field(default_factory=dict)
    """By group."""
    ready: list[_Ready] = field(default_factory=list)
    """Judged, waiting for a batch."""
    training: dict[int, int] = field(default_factory=dict)
    """version of the batch -> samples in it, until version + 1 is installed everywhere."""

    def charged(self) -> int:
        return self.in_flight() + len(self.ready) + sum(self.training.values())

    def in_flight(self) -> int:
        return sum(group.samples for group in self.flying.values())

    def must_wait(self, version: int) -> bool:
        """Would the batch of `version`, taken now, leave more due samples than later batches can hold?"""
        ready_at = Counter(max(version, entry.due) for entry in self.ready)
        flying_at = Counter[int]()
        for group in self.flying.values():
            flying_at[max(version, group.due)] += group.samples
        ready = flying = 0
        for due in sorted(ready_at.keys() | flying_at.keys()):
            ready, flying = ready + ready_at[due], flying + flying_at[due]
            if min(self.batch, ready + flying - (due - version) * self.batch) > ready:
                return True
        return False


@dataclass(slots=True)
class Flow:
    """Slots of all cells: what may be admitted now, and which samples make the next batch."""

    max_lag: int
    """For what is admitted from now on; may change at any moment. What was admitted before keeps its bound."""
    propose_samples: int
    solve_samples: int
    trained_attempts: int
    tasks: tuple[Task, ...]
    late: Literal["wait", "drop"] = "wait"
    version: int = 0
    """Newest version that every engine has."""
    first_group: int = 0
    """Of the numbers of groups under this version. Each kind of group counts for itself, so which numbers there are
    depends on how many groups there are, not on which came first: with max_lag = 0 nothing depends on timing."""
    _started: Counter[GroupKind] = field(default_factory=Counter)
    """Under this version."""
    _again: list[Admission] = field(default_factory=list)
    _cells: dict[Cell, _CellState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes: dict[Role, int] = {"propose": self.propose_samples, "solve": self.solve_samples}
        self._cells = {cell: _CellState(sizes[cell[0]]) for cell in CELLS if cell[1] in self.tasks}

    def admit(self, solvable: Collection[Task]) -> Admission | None:
        """The next group to start, or None when every window is full.

        Those of `reissue` come before any other. Then proposals; where a task's proposers are at their limit, tasks of
        the library (`solvable` names the kinds that have any) fill the solver's window. The emptiest cell goes first.
        """
        if self._again:
            return self._again.pop(0)
        proposable = [
            task
            for task in self.tasks
            if self._free(("propose", task)) >= 1
            and (self._free(("solve", task)) >= self.trained_attempts or self._lacks_proposals(task))
        ]
        refillable = [
            task
            for task in self.tasks
            if task in solvable and self._free(("propose", task)) < 1 and self._free(("solve", task)) >= 1
        ]
        role: Role
        for role, candidates in (("propose", proposable), ("solve", refillable)):
            if candidates:
                emptiness = {task: self._free((role, task)) / self._cells[role, task].batch for task in candidates}
                task = max(candidates, key=emptiness.__getitem__)
                return self._charge(self._next(task, is_proposal=role == "propose"))
        return None

    def reissue(self, groups: Iterable[Admission]) -> list[Admission]:
        """Have groups that an earlier process could not finish started anew, under their numbers; before any `admit`.

        Returns those for which there are no slots, because there are fewer now.
        """
        left_out = []
        for group in groups:
            slots = self._free(("solve", group.task)) if group.task in self.tasks else -1
            if slots < group.trained_attempts or (group.is_proposal and self._free(("propose", group.task)) < 1):
                left_out.append(group)
            else:
                self._again.append(self._charge(replace(group, version=self.version)))
        return left_out

    def release(self, group_id: int, cell: Cell, count: int | None = None) -> None:
        """Give back `count` (default: all) slots of a group whose samples will never exist."""
        flying = self._cells[cell].flying
        group = flying.pop(group_id, None)
        if group is not None and count is not None and group.samples > count:
            flying[group_id] = group._replace(samples=group.samples - count)

    def complete(self, rollout: Rollout) -> None:
        """A charged sample has been generated and judged."""
        cell = (rollout.role, rollout.task)
        group = self._cells[cell].flying.get(rollout.group_id)
        if group is None:
            raise TrainingError(
                f"rollout {rollout.rollout_id} of group {rollout.group_id} arrived without an admitted slot. "
                "This is a bug in the bookkeeping: keep the run directory and report it."
            )
        self.release(rollout.group_id, cell, 1)
        due = rollout.oldest_version + group.max_lag
        self._cells[cell].ready.append(_Ready(due, rollout.group_id, group.max_lag, rollout))

    def sweep(self, version: int) -> list[Rollout]:
        """Take out, and return, the samples that a batch of `version` may no longer contain."""
        dropped: list[Rollout] = []
        for cell in self._cells.values():
            dropped += [entry.rollout for entry in cell.ready if entry.due < version]
            cell.ready = [entry for entry in cell.ready if entry.due >= version]
        return dropped

    def compose(self, version: int, solvable: Collection[Task]) -> list[Rollout] | None:
        """The batch that weights of `version` train on, oldest samples first; None while it must still wait.

        A solver cell is excused when its kind has nothing to solve: no task in the library, none on the way.
        """
        chosen: list[tuple[_CellState, list[_Ready]]] = []
        for (role, task), cell in self._cells.items():
            excused = role == "solve" and task not in solvable and cell.charged() == 0
            if not excused and (len(cell.ready) < cell.batch or (self.late == "wait" and cell.must_wait(version))):
                return None
            chosen.append((cell, sorted(cell.ready, key=lambda entry: entry[:2])[: cell.batch]))
        batch: list[Rollout] = []
        for cell, entries in chosen:
            taken = {id(entry.rollout) for entry in entries}
            cell.ready = [entry for entry in cell.ready if id(entry.rollout) not in taken]
            cell.training[version] = len(entries)
            batch += [entry.rollout for entry in entries]
            for max_lag in {entry.max_lag for entry in entries}:
                same = (entry.rollout for entry in entries if entry.max_lag == max_lag)
                check_lag(same, version=version, max_lag=max_lag)
        return batch

    def installed(self, version: int) -> None:
        """Every engine samples with `version` now: slots of older batches come back."""
        if version < self.version:
            raise TrainingError(
                f"version {version} was announced after version {self.version}. "
                "This is a bug in the bookkeeping: keep the run directory and report it."
            )
        if version > self.version:  # else it is told once more, for a worker that has come later
            self.first_group += len(_GROUP_KINDS) * max(self._started.values(), default=0)
            self._started.clear()
        self.version = version
        for cell in self._cells.values():
            cell.training = {trained: count for trained, count in cell.training.items() if trained >= version}

    def took(self, version: int, cells: Mapping[Cell, int]) -> None:
        """The learner has the batch of `version` from an earlier process: so many samples of each cell."""
        for cell, count in cells.items():
            self._cells[cell].training[version] = count

    def groups(self) -> set[int]:
        """Groups of which samples are being generated or wait for a batch."""
        return {
            group
            for cell in self._cells.values()
            for groups in (cell.flying, (entry.group_id for entry in cell.ready))
            for group in groups
        }

    def alive(self) -> dict[Cell, tuple[int, int]]:
        """Per cell: samples being generated, samples waiting for a batch."""
        return {key: (cell.in_flight(), len(cell.ready)) for key, cell in self._cells.items()}

    def _free(self, cell: Cell) -> int:
        return (self.max_lag + 1) * self._cells[cell].batch - self._cells[cell].charged()

    def _lacks_proposals(self, task: Task) -> bool:
        """Too few for a batch? Then one may start although its attempts find no room, and are judged but not trained.

        Where the bound never changes this does not occur: the solver's window has room for all that the proposer's has.
        """
        cell = self._cells["propose", task]
        return cell.charged() < cell.batch

    def _next(self, task: Task, *, is_proposal: bool) -> Admission:
        kind = (task, is_proposal)
        number = self.first_group + len(_GROUP_KINDS) * self._started[kind] + _GROUP_KINDS.index(kind)
        self._started[kind] += 1
        attempts = max(0, min(self.trained_attempts, self._free(("solve", task))))
        return Admission(
            group_id=number, task=task, is_proposal=is_proposal, trained_attempts=attempts, version=self.version
        )

    def _charge(self, group: Admission) -> Admission:
        roles: tuple[Role, ...] = ("solve", "propose") if group.is_proposal else ("solve",)
        for role in roles:
            count = 1 if role == "propose" else group.trained_attempts
            self._cells[role, group.task].flying[group.group_id] = _Flying(count, self.version, self.max_lag)
        return group
