"""The durable library."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.values import encode
from azr_async.errors import CheckpointError
from azr_async.messages import Pair, Problem

TASK = Problem(
    task="induction",
    program="def f(x):\n    return {x: '\u00e9'}",
    pairs=tuple(Pair(input=str(n), output=repr({n: "é"}), value=encode({n: "é"})) for n in range(4)),
    message="a 'message'",
    shown_pairs=2,
)


async def test_what_was_added_is_there_for_the_next_process(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        await journal.add(TASK, version=3)
        with SqliteJournal(tmp_path / "journal.sqlite") as reader:  # not closed, not flushed: a killed writer
            assert reader.problems() == [TASK]


async def test_a_resumed_run_forgets_what_was_found_under_newer_weights(tmp_path: Path) -> None:
    tasks = [replace(TASK, program=f"def f(x):\n    return x + {version}") for version in range(5)]
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for version, task in enumerate(tasks):
            await journal.add(task, version=version)
        journal.forget_after(2)
        assert journal.problems() == tasks[:3]
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        assert journal.problems() == tasks[:3]


async def test_it_is_readable_with_any_sqlite_tool(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        await journal.add(TASK, version=3)
    rows = sqlite3.connect(tmp_path / "journal.sqlite").execute("SELECT task, version FROM tasks").fetchall()
    assert rows == [("induction", 3)]


def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(CheckpointError, match=r"journal\.sqlite cannot be used.*move the file away"):
        SqliteJournal(tmp_path / "journal.sqlite")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CheckpointError, match="schema version 99"):
        SqliteJournal(tmp_path / "journal.sqlite")
