"""The ledger: in any order of events and from any crash, a sample is in the weights at most once."""

from collections import Counter, defaultdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from azr_async.algorithm.ledger import Entry, Ledger, SampleId, rolled_back, samples_of, written
from azr_async.errors import TrainingError
from azr_async.messages import Admission, Task

SAMPLES = st.builds(SampleId, st.integers(0, 5), st.sampled_from(("propose", "solve")), st.integers(0, 2))
RANDOMS = st.randoms(use_true_random=False)


def group(number: int, version: int = 0, *, attempts: int = 2, is_proposal: bool = True) -> Admission:
    return Admission(
        group_id=number, task="deduction", is_proposal=is_proposal, trained_attempts=attempts, version=version
    )


class AnyRun(RuleBasedStateMachine):
    """Events in any order; what is not yet written is lost in a crash; a run goes on from any checkpoint.

    `steps` is the truth: which samples each step of the present weights was trained on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.disk: dict[SampleId, Entry] = {}
        self.version = 0
        self.groups: list[Admission] = []
        self.next = 0
        self.seen: list[SampleId] = []
        self.batches: defaultdict[int, list[SampleId]] = defaultdict(list)
        self.steps: list[list[SampleId]] = []
        self.checkpoints = {0}

    def some(self, chance: Random) -> list[SampleId]:
        """Most of the samples that there ever were, in any order."""
        return [sample for sample in chance.sample(self.seen, len(self.seen)) if chance.random() < 0.8]

    @rule(offset=st.integers(-3, 2), attempts=st.integers(0, 3), is_proposal=st.booleans())
    def lease(self, offset: int, attempts: int, is_proposal: bool) -> None:
        """A new number, mostly; sometimes one that was there before."""
        place = max(0, self.next + offset)
        number = 2 * place + is_proposal  # no two kinds share a number
        started = group(number, self.version, attempts=attempts, is_proposal=is_proposal)
        if self.ledger.lease(started):
            self.next = max(self.next, place + 1)
            self.seen = sorted({*self.seen, *samples_of(started)})

    @rule(chance=RANDOMS)
    def returned(self, chance: Random) -> None:
        for sample in self.some(chance):
            self.ledger.returned(sample)

    @rule(chance=RANDOMS)
    def judged(self, chance: Random) -> None:
        for sample in self.some(chance):
            self.ledger.judged(sample, 1.0)

    @rule(chance=RANDOMS)
    def dropped(self, chance: Random) -> None:
        for sample in self.some(chance)[:2]:
            self.ledger.dropped(sample, "late", version=self.version)

    @rule(chance=RANDOMS, ahead=st.integers(0, 1))
    def admitted(self, chance: Random, ahead: int) -> None:
        """Also the batch after next is composed before the next is trained."""
        for sample in self.some(chance):
            if self.ledger.admitted(sample, version=self.version + ahead):
                self.batches[self.version + ahead].append(sample)

    @rule()
    def trained(self) -> None:
        self.steps.append(self.batches.pop(self.version, []))
        self.version += 1
        self.ledger.installed(self.version)

    @rule(chance=RANDOMS, ahead=st.integers(0, 1))
    def one_step(self, chance: Random, ahead: int) -> None:
        """The usual course of things."""
        self.lease(0, 2, is_proposal=True)
        self.judged(chance)
        self.admitted(chance, ahead)
        self.trained()
        self.commit()

    @rule()
    def commit(self) -> None:
        changes = self.ledger.take()
        self.groups += changes.groups
        self.disk = written(self.disk, changes.samples)

    @rule()
    def save(self) -> None:
        self.commit()
        self.checkpoints.add(self.version)

    @precondition(lambda self: self.version > 0)
    @rule(data=st.data())
    def crash_and_resume(self, data: st.DataObject) -> None:
        self.version = data.draw(st.sampled_from(sorted(self.checkpoints)))
        self.checkpoints = {version for version in self.checkpoints if version <= self.version}
        self.steps = self.steps[: self.version]
        self.batches.clear()
        self.disk = rolled_back(self.disk, self.version)
        trained = [sample for sample, entry in self.disk.items() if entry.stage == "trained"]
        assert sorted(trained) == sorted(sample for step in self.steps for sample in step)
        self.groups = [admission for admission in self.groups if admission.version < self.version]
        newest: dict[tuple[Task, bool], int] = {}
        for admission in self.groups:
            kind = (admission.task, admission.is_proposal)
            newest[kind] = max(newest.get(kind, -1), admission.group_id)
        self.ledger = Ledger(newest=newest)
        for admission in self.groups:
            stages = {self.disk[sample].stage for sample in samples_of(admission)}
            if stages <= {"leased"}:
                self.ledger.lease(admission, is_reissue=True)

    @invariant()
    def no_sample_is_twice_in_the_weights(self) -> None:
        assert all(count == 1 for count in Counter(sample for step in self.steps for sample in step).values())


AnyRun.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
test_no_sample_is_twice_in_the_weights_whatever_happens = AnyRun.TestCase


@given(version=st.integers(0, 6), data=st.data())
def test_rolling_back_opens_exactly_what_was_closed_later(version: int, data: st.DataObject) -> None:
    entry = st.builds(
        Entry,
        version=st.integers(0, 5),
        stage=st.sampled_from(("admitted", "trained", "dropped")),
        step=st.integers(1, 6),
    )
    entries = data.draw(st.dictionaries(SAMPLES, entry))
    after = rolled_back(entries, version)
    assert set(after) == {sample for sample, old in entries.items() if old.version < version}
    assert {sample for sample in after if after[sample].stage == "leased"} == {
        sample for sample in after if (entries[sample].step or 0) > version
    }
    assert rolled_back(after, version) == after


def test_a_sample_goes_from_lease_to_weights_once() -> None:
    ledger, (sample, *_) = Ledger(), samples_of(group(0))
    assert ledger.lease(group(0))
    assert ledger.returned(sample)
    assert ledger.judged(sample, 0.5)
    assert ledger.admitted(sample, version=0)
    assert not ledger.admitted(sample, version=1)
    ledger.installed(1)
    assert ledger.take().samples[sample] == Entry(version=0, stage="trained", reward=0.5, step=1)
    assert not any([ledger.returned(sample), ledger.judged(sample, 1.0), ledger.dropped(sample, "late", version=1)])
    assert not ledger.lease(group(0))
    assert ledger.refused == 5


def test_what_a_group_turned_out_not_to_need_is_dropped_by_name() -> None:
    ledger, (proposer, *solvers) = Ledger(), samples_of(group(3))
    ledger.lease(group(3))
    ledger.judged(proposer, -1.0)
    ledger.drop_rest(3, "malformed", version=0)
    entries = ledger.take().samples
    assert entries[proposer].stage == "judged"
    assert {(entries[sample].stage, entries[sample].reason) for sample in solvers} == {("dropped", "malformed")}
    assert len(ledger) == 1


def test_a_resumed_group_is_leased_again_under_its_number() -> None:
    ledger = Ledger(newest={("deduction", True): 7})
    assert not ledger.lease(group(7))
    assert ledger.lease(group(7), is_reissue=True)
    assert ledger.take().groups == []


def test_a_closed_sample_is_never_written_again() -> None:
    sample = SampleId(1, "solve", 0)
    with pytest.raises(TrainingError, match=r"sample 0 \(solve\) of group 1 was trained or dropped"):
        written({sample: Entry(version=0, stage="trained", step=1)}, {sample: Entry(version=2)})
