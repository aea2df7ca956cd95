"""The journal under a learner that goes on: what it holds stays admitted, the rest is open again."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.ledger import Changes, Entry, Ledger, SampleId, samples_of, taken_over
from azr_async.algorithm.library import KnownTask, TaskUse, identity_problem, task_key
from azr_async.messages import Admission

OPEN = st.builds(Entry, version=st.integers(0, 5), stage=st.sampled_from(("leased", "returned", "judged")))
ADMITTED = st.builds(Entry, version=st.integers(0, 5), stage=st.just("admitted"), step=st.integers(1, 7))
CLOSED = st.builds(
    Entry, version=st.integers(0, 5), stage=st.sampled_from(("trained", "dropped")), step=st.integers(1, 7)
)
SAMPLES = st.builds(SampleId, st.integers(0, 9), st.sampled_from(("propose", "solve")), st.integers(0, 3))
GROUPS = [
    Admission(group_id=number, task="deduction", is_proposal=True, trained_attempts=4, version=0)
    for number in range(10)
]
ENTRIES = st.dictionaries(SAMPLES, OPEN | ADMITTED | CLOSED)


@settings(max_examples=40)
@given(entries=ENTRIES, version=st.integers(0, 6), held=st.sets(st.integers(0, 7)))
def test_the_journal_takes_over_as_the_ledger_says(
    entries: dict[SampleId, Entry], version: int, held: set[int]
) -> None:
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=GROUPS, samples=entries))
        journal.take_over(version, held)
        assert journal.samples() == taken_over(entries, version, held)


@given(entries=ENTRIES, version=st.integers(0, 6), held=st.sets(st.integers(0, 7)))
def test_what_is_in_the_weights_or_held_is_never_open_again(
    entries: dict[SampleId, Entry], version: int, held: set[int]
) -> None:
    after = taken_over(entries, version, held)
    for sample, before in entries.items():
        in_batch = before.stage == "admitted" and before.step is not None
        is_kept = in_batch and (before.step <= version or before.step - 1 in held)  # type: ignore[operator]
        assert (after[sample].stage == "leased") == (before.stage not in ("trained", "dropped") and not is_kept)
    assert taken_over(after, version, held) == after


def test_a_group_of_which_the_learner_holds_a_part_is_not_started_anew() -> None:
    held, whole = (
        Admission(group_id=number, task="deduction", is_proposal=True, trained_attempts=2, version=2)
        for number in (4, 5)
    )
    entries = {sample: Entry(version=2) for group in (held, whole) for sample in samples_of(group)}
    proposer = samples_of(held)[0]
    entries[proposer] = Entry(version=2, stage="admitted", reward=0.5, step=4)
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=[held, whole], samples=entries))
        journal.take_over(3, [3])
        assert journal.left_groups(3) == [whole]
        assert journal.admitted() == [(proposer, entries[proposer], "deduction")]
        ledger = Ledger(newest=journal.newest_groups())
        ledger.hold({sample: entry for sample, entry, _ in journal.admitted()})
        ledger.installed(4)
        journal.record(ledger.take())
        assert journal.samples()[proposer].stage == "trained"


async def test_how_tasks_were_used_is_read_back() -> None:
    problem, use = identity_problem("deduction"), TaskUse(draws=3, attempts=4, successes=1, reward=0.75, last_use=9)
    with SqliteJournal(Path(":memory:")) as journal:
        await journal.add(problem, version=1)
        journal.note_use([KnownTask(problem=problem, use=use)])
        assert journal.uses() == {task_key(problem): use}
