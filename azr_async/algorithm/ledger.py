"""The ledger of work: what became of every sample, so that none is trained twice and none vanishes unexplained.

    leased -> returned -> judged -> admitted -> trained
       └─────────┴──────────┴──────────┴─> dropped, and why

A group leases all of its samples at once. A batch admits a sample; when weights that contain the batch are installed,
it is trained. Trained and dropped are final. An event that does not fit (late, repeated, out of order) changes nothing
and is counted. Only `rolled_back` ever opens a closed sample again: for weights that do not contain it. What was closed
before the oldest weights that a run can go back to is closed for ever: the journal keeps the sums of it only.

Steps count from 1: the batch of version v is trained in step v + 1, and weights of version s contain steps 1 to s.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple, TypeVar

from azr_async.errors import TrainingError
from azr_async.messages import Admission, Role, Task

Stage = Literal["leased", "returned", "judged", "admitted", "trained", "dropped"]
FINAL: Final = frozenset({"trained", "dropped"})


class SampleId(NamedTuple):
    """Which sample of which group."""

    group_id: int
    role: Role
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the ledger says about one sample."""

    version: int
    """Newest weights when it was first leased."""
    stage: Stage = "leased"
    reward: float | None = None
    step: int | None = None
    """In which it was admitted, trained or dropped."""
    reason: str = ""
    """Why it was dropped."""


Entries = Mapping[SampleId, Entry]
Kind = TypeVar("Kind")


@dataclass(slots=True)
class Changes:
    """What is new since the last `Ledger.take`: the newest state only of each sample."""

    groups: list[Admission] = field(default_factory=list)
    samples: dict[SampleId, Entry] = field(default_factory=dict)


class Ledger:
    """The open samples, and what has changed. Closed ones are forgotten here: the journal has them."""

    def __init__(self, *, newest: Mapping[tuple[Task, bool], int] | None = None) -> None:
        """`newest`: the largest group number that the journal has, by task and `is_proposal`."""
        self.refused = 0
        """Events that did not fit, so far."""
        self._newest = dict(newest or {})
        self._open: dict[SampleId, Entry] = {}
        self._groups: dict[int, set[SampleId]] = {}  # the open samples of each
        self._changes = Changes()

    def __contains__(self, sample: SampleId) -> bool:
        """Is it leased, and neither trained nor dropped?"""
        return sample in self._open

    def has_open(self, group_id: int) -> bool:
        """Has this group samples that are neither trained nor dropped?"""
        return group_id in self._groups

    def __len__(self) -> int:
        return len(self._open)

    def lease(self, group: Admission, *, is_reissue: bool = False) -> bool:
        """A group is started: all of its samples. Each number is leased once; numbers of a kind only go up.

        `is_reissue`: the group is in the journal already, with samples that a resumed run makes anew.
        """
        kind = (group.task, group.is_proposal)
        samples = samples_of(group)
        is_new = group.group_id > self._newest.get(kind, -1)
        if group.group_id in self._groups or not (is_new or is_reissue):
            return self._refuse()
        if is_new:
            self._newest[kind] = group.group_id
            self._changes.groups.append(group)
        for sample in samples:
            self._put(sample, Entry(version=group.version))
        return True

    def hold(self, admitted: Entries) -> None:
        """Samples that an earlier process has admitted to batches which the learner has: they are in the journal."""
        for sample, entry in admitted.items():
            self._open[sample] = entry
            self._groups.setdefault(sample.group_id, set()).add(sample)

    def returned(self, sample: SampleId) -> bool:
        """Its completion has come."""
        return self._advance(sample, ("leased",), "returned")

    def judged(self, sample: SampleId, reward: float) -> bool:
        """Its reward is known."""
        return self._advance(sample, ("leased", "returned"), "judged", reward=reward)

    def admitted(self, sample: SampleId, *, version: int) -> bool:
        """It is in the batch that weights of `version` are trained on."""
        return self._advance(sample, ("judged",), "admitted", step=version + 1)

    def dropped(self, sample: SampleId, reason: str, *, version: int) -> bool:
        """It will never be trained; `version` is the newest that is installed."""
        return self._advance(sample, ("leased", "returned", "judged"), "dropped", step=version + 1, reason=reason)

    def drop_rest(self, group_id: int, reason: str, *, version: int) -> None:
        """Of a group that is over: what was leased, and has turned out not to be needed."""
        for sample in sorted(self._groups.get(group_id, ())):
            if self._open[sample].stage in ("leased", "returned"):
                self.dropped(sample, reason, version=version)

    def installed(self, version: int) -> None:
        """Weights of `version` are everywhere: they contain the batches of all versions before."""
        contained = [
            sample
            for sample, entry in self._open.items()
            if entry.stage == "admitted" and entry.step is not None and entry.step <= version
        ]
        for sample in contained:
            self._advance(sample, ("admitted",), "trained", step=self._open[sample].step)

    def take(self) -> Changes:
        """What has changed since the last call, to be written down."""
        changes, self._changes = self._changes, Changes()
        return changes

    def _advance(
        self,
        sample: SampleId,
        before: Iterable[Stage],
        stage: Stage,
        *,
        reward: float | None = None,
        step: int | None = None,
        reason: str = "",
    ) -> bool:
        entry = self._open.get(sample)
        if entry is None or entry.stage not in before:
            return self._refuse()
        known = entry.reward if reward is None else reward
        self._put(sample, Entry(version=entry.version, stage=stage, reward=known, step=step, reason=reason))
        return True

    def _put(self, sample: SampleId, entry: Entry) -> None:
        self._changes.samples[sample] = entry
        if entry.stage not in FINAL:
            self._open[sample] = entry
            self._groups.setdefault(sample.group_id, set()).add(sample)
            return
        del self._open[sample]
        self._groups[sample.group_id].remove(sample)
        if not self._groups[sample.group_id]:
            del self._groups[sample.group_id]

    def _refuse(self) -> bool:
        self.refused += 1
        return False


def samples_of(group: Admission) -> list[SampleId]:
    """All samples that a group is to yield: the proposer's, and the solvers' that are trained on."""
    proposer = [SampleId(group.group_id, "propose", 0)] if group.is_proposal else []
    return proposer + [SampleId(group.group_id, "solve", number) for number in range(group.trained_attempts)]


def written(before: Entries, changes: Entries) -> dict[SampleId, Entry]:
    """The journal's samples after a write.

    Raises TrainingError when a sample that is closed would be changed: it could be trained twice.
    """
    for sample in changes:
        if sample in before and before[sample].stage in FINAL:
            raise closed_twice(f"sample {sample.number} ({sample.role}) of group {sample.group_id}")
    return {**before, **changes}


def rolled_back(entries: Entries, version: int) -> dict[SampleId, Entry]:
    """The ledger of a run that goes on from a checkpoint of `version`. The journal does this in SQL; tests compare.

    What these weights contain is trained; what was dropped before stays so. Every other sample is open anew, for its
    completion is gone, and those that were leased under weights of `version` or newer have never been.
    """
    kept = {sample: entry for sample, entry in entries.items() if entry.version < version}
    return {sample: _rolled_back(entry, version) for sample, entry in kept.items()}


def taken_over(entries: Entries, version: int, held: Collection[int]) -> dict[SampleId, Entry]:
    """The ledger when self-play is started again under a learner that goes on. The journal does this in SQL; tests
    compare.

    It is at `version` and has the batches of the versions `held`: those are not composed again. A batch that it does
    not have never reached it: its samples are open anew, as are all whose completions are gone.
    """
    return {sample: _taken_over(entry, version, held) for sample, entry in entries.items()}


def _taken_over(entry: Entry, version: int, held: Collection[int]) -> Entry:
    if entry.stage in FINAL:
        return entry
    if entry.step is not None and entry.step <= version:
        return replace(entry, stage="trained")
    is_held = entry.step is not None and entry.step - 1 in held
    return entry if is_held else Entry(version=entry.version)


def _rolled_back(entry: Entry, version: int) -> Entry:
    if entry.step is None or entry.step > version:
        return Entry(version=entry.version)
    return replace(entry, stage="trained") if entry.stage == "admitted" else entry


def before_first_open(groups: Iterable[tuple[int, Kind, bool]], stuck: set[Kind]) -> list[int]:
    """The groups that can be summed up: of each kind, those before the first that cannot be.

    So everything of a kind up to one number is closed for ever, and a number suffices to know it.

    Args:
        groups: in their order: number, kind, and whether all of its samples are closed for ever.
        stuck: kinds of which one was met that cannot be summed up; those that are met now are added.
    """
    chosen = []
    for number, kind, is_closed in groups:
        if not is_closed:
            stuck.add(kind)
        elif kind not in stuck:
            chosen.append(number)
    return chosen


def summed(entries: Entries) -> Counter[tuple[int | None, Stage, str]]:
    """How many samples ended in which step, how, and why."""
    return Counter((entry.step, entry.stage, entry.reason) for entry in entries.values())


def closed_twice(what: str) -> TrainingError:
    """The error for a sample that is trained or dropped, and was to be changed all the same."""
    return TrainingError(
        f"{what} was trained or dropped before, and would be so again. "
        "This is a bug in the bookkeeping: keep the run directory and report it."
    )
