"""The durable library and ledger."""

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_async.adapters.journal import SCHEMA_VERSION, SqliteJournal
from azr_async.algorithm.ledger import Changes, Entry, Ledger, SampleId, rolled_back, samples_of, summed
from azr_async.algorithm.library import KnownTask, TaskUse
from azr_async.algorithm.values import encode
from azr_async.errors import CheckpointError, TrainingError
from azr_async.messages import Admission, Pair, Problem

TASK = Problem(
    task="induction",
    program="def f(x):\n    return {x: '\u00e9'}",
    pairs=tuple(Pair(input=str(n), output=repr({n: "é"}), value=encode({n: "é"})) for n in range(4)),
    message="a 'message'",
    shown_pairs=2,
)
ENTRIES = st.dictionaries(
    st.builds(SampleId, st.integers(0, 9), st.sampled_from(("propose", "solve")), st.integers(0, 2)),
    st.one_of(
        st.builds(Entry, version=st.integers(0, 5), stage=st.sampled_from(("leased", "judged"))),
        st.builds(
            Entry,
            version=st.integers(0, 5),
            stage=st.sampled_from(("admitted", "trained", "dropped")),
            reward=st.sampled_from((None, 0.5)),
            step=st.integers(1, 6),
        ),
    ),
)


def group(number: int, version: int = 0) -> Admission:
    return Admission(group_id=number, task="deduction", is_proposal=True, trained_attempts=2, version=version)


async def test_what_was_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        await journal.add(TASK, version=3)
        with SqliteJournal(tmp_path / "journal.sqlite") as reader:  # not closed, not flushed: a killed writer
            assert reader.problems() == [TASK]


def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    program = f"""
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.library import identity_problem

async def add(journal, number):
    await journal.add(replace(identity_problem("deduction"), program=f"def f(x): return {{number}}"), version=number)
    print(number, flush=True)
    if number == 40:
        os.kill(os.getpid(), 9)

async def main():
    journal = SqliteJournal(Path({str(path)!r}))
    async with asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(add(journal, number))
            await asyncio.sleep(0.001 * (number % 3))

asyncio.run(main())
"""
    killed = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    acknowledged = {int(line) for line in killed.stdout.split()}
    with SqliteJournal(path) as journal:
        kept = {found.version for found in journal.tasks()}
    assert killed.returncode == -9
    assert len(acknowledged) > 20
    assert acknowledged <= kept


async def test_many_adds_share_a_commit(tmp_path: Path) -> None:
    tasks = [replace(TASK, program=f"def f(x):\n    return x + {number}") for number in range(50)]
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        async with asyncio.TaskGroup() as adding:
            for number, task in enumerate(tasks):
                adding.create_task(journal.add(task, version=0, group_id=number))
        assert [found.group_id for found in journal.tasks()] == list(range(50))
        assert journal.numbers()["commits"] < 10


async def test_a_known_task_is_not_written_twice(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        await journal.add(TASK, version=3)
        await journal.add(replace(TASK, program=TASK.program + "\n\n", message="other"), version=4)
        assert journal.problems() == [TASK]


async def test_a_task_knows_its_parents_and_its_use(tmp_path: Path) -> None:
    child = replace(TASK, program="def f(x):\n    return x")
    use = TaskUse(draws=3, attempts=8, successes=5, reward=0.375, last_use=7)
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        await journal.add(TASK, version=0, group_id=-1)
        await journal.add(child, version=0, group_id=4, parents=[TASK])
        journal.note_use([KnownTask(problem=child, use=use)])
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as reader:
        rows = reader.execute(
            "SELECT group_id, parents, draws, attempts, successes, reward, last_use FROM tasks"
        ).fetchall()
    assert rows == [(-1, "[]", 0, 0, 0, None, None), (4, "[1]", 3, 8, 5, 0.375, 7)]


async def test_many_tasks_get_each_its_own_use_at_once(tmp_path: Path) -> None:
    tasks = [replace(TASK, program=f"def f(x):\n    return x + {number}") for number in range(150)]
    uses = [TaskUse(draws=number, attempts=2 * number, successes=1, last_use=number % 7) for number in range(150)]
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for task in tasks:
            await journal.add(task, version=0)
        journal.note_use(KnownTask(problem=task, use=use) for task, use in zip(tasks, uses, strict=True))
        await journal.flush()
        assert list(journal.uses().values()) == uses


async def test_the_ledger_is_on_the_disk_after_a_flush(tmp_path: Path) -> None:
    ledger, (proposer, *solvers) = Ledger(), samples_of(group(5, 2))
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        ledger.lease(group(5, 2))
        journal.record(ledger.take())
        ledger.judged(proposer, 0.5)
        ledger.admitted(proposer, version=2)
        ledger.installed(3)
        ledger.dropped(solvers[0], "late", version=3)
        journal.record(ledger.take())
        await journal.flush()
        with SqliteJournal(tmp_path / "journal.sqlite") as reader:
            assert reader.samples() == {
                proposer: Entry(version=2, stage="trained", reward=0.5, step=3),
                solvers[0]: Entry(version=2, stage="dropped", step=4, reason="late"),
                solvers[1]: Entry(version=2),
            }
            assert reader.left_groups(3) == []
            assert reader.newest_groups() == {("deduction", True): 5}


def test_closing_writes_what_nobody_waited_for(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.lease(group(1))
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        journal.record(ledger.take())
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        assert journal.left_groups(0) == [group(1)]


@settings(max_examples=40)
@given(entries=ENTRIES, version=st.integers(0, 6))
def test_the_journal_rolls_back_as_the_ledger_says(entries: dict[SampleId, Entry], version: int) -> None:
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=[group(number) for number in range(10)], samples=entries))
        journal.roll_back(version)
        assert journal.samples() == rolled_back(entries, version)


def test_a_group_that_is_in_the_weights_in_part_is_not_started_anew() -> None:
    in_part, whole, done = group(0), group(1), group(2)
    trained = Entry(version=0, stage="trained", step=1)
    ledger = {sample: Entry(version=0) for admission in (in_part, whole) for sample in samples_of(admission)}
    ledger |= {samples_of(in_part)[0]: trained} | dict.fromkeys(samples_of(done), trained)
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=[in_part, whole, done], samples=ledger))
        journal.roll_back(4)
        assert journal.left_groups(4) == [whole]
        stages = {sample: entry.stage for sample, entry in journal.samples().items() if entry.step == 5}
        assert stages == dict.fromkeys(samples_of(in_part)[1:], "dropped")


async def test_a_sample_that_is_closed_is_never_written_again_nor_anything_after_it() -> None:
    journal = SqliteJournal(Path(":memory:"))
    closed = Changes(groups=[group(1)], samples={SampleId(1, "solve", 0): Entry(version=0, stage="trained", step=1)})
    journal.record(closed)
    journal.record(closed)
    for _ in range(2):
        with pytest.raises(TrainingError, match="trained or dropped before"):
            await journal.add(TASK, version=1)
    with pytest.raises(TrainingError, match="trained or dropped before"):
        journal.close()


def a_ledger(closed_steps: list[int | None]) -> tuple[list[Admission], dict[SampleId, Entry]]:
    """One group per entry, of two kinds in turn: all of its samples were trained in this step; None: it is open."""
    groups = [
        replace(group(number, max(0, (step or 99) - 2)), is_proposal=number % 2 == 0)
        for number, step in enumerate(closed_steps)
    ]
    entries = {
        sample: Entry(version=one.version, stage="trained" if step else "judged", step=step)
        for one, step in zip(groups, closed_steps, strict=True)
        for sample in samples_of(one)
    }
    return groups, entries


STEPS = st.lists(st.one_of(st.none(), st.integers(1, 6)), max_size=12)


@settings(max_examples=40)
@given(steps=STEPS, up_to=st.integers(0, 6), later=st.integers(0, 2))
def test_what_is_summed_up_still_adds_up_and_can_be_rolled_back(
    steps: list[int | None], up_to: int, later: int
) -> None:
    groups, entries = a_ledger(sorted(steps, key=lambda step: step or 99))  # as versions go
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=groups, samples=entries))
        newest, before = journal.newest_groups(), journal.sums()
        journal.sum_up(up_to)
        finish(journal)
        assert journal.sums() == before == summed(entries)
        assert journal.newest_groups() == newest
        left = {sample: entry for sample, entry in entries.items() if entry.step is None or entry.step > up_to}
        assert journal.samples() == left
        journal.roll_back(up_to + later)
        assert journal.samples() == rolled_back(left, up_to + later)


def finish(journal: SqliteJournal) -> None:
    """Wait until nothing is left to be summed up: each part asks for the next one."""
    left = None
    while (samples := journal.samples().keys()) != left:
        left = samples


def test_groups_behind_one_that_is_open_wait_for_it() -> None:
    groups, entries = a_ledger([1, 1, None, 1, 1, 1])
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=groups, samples=entries))
        journal.sum_up(3)
        finish(journal)
        assert {sample.group_id for sample in journal.samples()} == {2, 4}
        journal.record(
            Changes(samples={sample: Entry(version=0, stage="dropped", step=2) for sample in samples_of(groups[2])})
        )
        journal.sum_up(3)
        finish(journal)
        assert journal.samples() == {}
        assert journal.sums() == {(1, "trained", ""): 12, (2, "dropped", ""): 3}


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_sample_that_was_summed_up_is_never_written_again(is_known: bool) -> None:
    (one,), entries = a_ledger([1])
    journal = SqliteJournal(Path(":memory:"))
    journal.record(Changes(groups=[one], samples=entries))
    journal.sum_up(1)
    finish(journal)
    journal.record(Changes(groups=[one] * is_known, samples=dict.fromkeys(samples_of(one), Entry(version=7))))
    with pytest.raises(TrainingError, match="trained or dropped before"):
        await journal.flush()
    with pytest.raises(TrainingError):
        journal.close()


def test_no_run_goes_on_from_before_what_was_summed_up() -> None:
    groups, entries = a_ledger([1, 2, 3])
    with SqliteJournal(Path(":memory:")) as journal:
        journal.record(Changes(groups=groups, samples=entries))
        journal.sum_up(2)
        finish(journal)
        with pytest.raises(CheckpointError, match=r"up to step 2.*from step 1\. Resume from a newer checkpoint"):
            journal.roll_back(1)
        journal.roll_back(2)


def test_the_file_stops_growing_when_old_steps_are_summed_up(tmp_path: Path) -> None:
    path, sizes = tmp_path / "journal.sqlite", []
    with SqliteJournal(path) as journal:
        for step in range(1, 121):
            groups = [group(number, step - 1) for number in range(70 * step, 70 * step + 70)]
            closed = Entry(version=step - 1, stage="trained", reward=0.5, step=step)
            journal.record(Changes(groups=groups, samples={s: closed for one in groups for s in samples_of(one)}))
            if step % 20 == 0:
                journal.sum_up(step - 20)
                finish(journal)
                sizes.append(path.stat().st_size)
        assert sum(journal.sums().values()) == 120 * 210
    assert sizes[-1] < 1.2 * sizes[2]


async def test_it_is_readable_with_any_sqlite_tool(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        await journal.add(TASK, version=3)
        with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as reader:  # while it is written
            assert reader.execute("SELECT task, version FROM tasks").fetchall() == [("induction", 3)]


def test_a_full_disk_is_told_with_the_way_out(tmp_path: Path) -> None:
    program = f"""
import asyncio, resource
from dataclasses import replace
from pathlib import Path
from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.library import identity_problem
from azr_async.errors import CheckpointError

async def main():
    with SqliteJournal(Path({str(tmp_path / "journal.sqlite")!r})) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        await journal.add(replace(identity_problem("deduction"), message="x" * 2**20), version=0)

try:
    asyncio.run(main())
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert "journal.sqlite cannot be written" in done.stdout
    assert "Free disk space, then continue with --resume" in done.stdout


def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(CheckpointError, match=r"journal\.sqlite cannot be used.*move the file away"):
        SqliteJournal(tmp_path / "journal.sqlite")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(CheckpointError, match="schema version 99"):
        SqliteJournal(tmp_path / "journal.sqlite")


def test_a_journal_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute(
            "CREATE TABLE tasks (id INTEGER PRIMARY KEY, task TEXT NOT NULL, program TEXT NOT NULL, "
            "pairs TEXT NOT NULL, shown INTEGER NOT NULL, message TEXT NOT NULL, version INTEGER NOT NULL)"
        )
        pairs = '[{"input": "1", "output": "2", "value": "{}"}]'
        for number, program in enumerate(("def f(x): return 2", "def f(x): return 2\n", "def f(x): return x + 1")):
            old.execute("INSERT INTO tasks VALUES (?, 'deduction', ?, ?, 1, '', 0)", (number + 1, program, pairs))
        old.execute("PRAGMA user_version = 1")
    for _ in range(2):
        with SqliteJournal(path) as journal:
            assert [found.number for found in journal.tasks()] == [1, 2, 3]  # also the one that is a double now
            assert journal.samples() == {}
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert reader.execute("SELECT count(*), count(key) FROM tasks").fetchone() == (3, 2)
