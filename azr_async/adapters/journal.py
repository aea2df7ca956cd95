"""The durable library: valid tasks in `journal.sqlite`, readable with any SQLite tool (schema: docs/journal.md)."""

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Final, Self

from azr_async.errors import CheckpointError
from azr_async.messages import Pair, Problem

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS tasks (
    id      INTEGER PRIMARY KEY,   -- in the order in which they were found
    task    TEXT NOT NULL,         -- deduction, abduction or induction
    program TEXT NOT NULL,
    pairs   TEXT NOT NULL,         -- JSON: [{"input", "output", "value"}, ...]
    shown   INTEGER NOT NULL,      -- pairs that solvers see
    message TEXT NOT NULL,
    version INTEGER NOT NULL       -- newest weights version when it was admitted
)
"""


class SqliteJournal:
    """Fulfils ports.Journal: one writer, and every accepted task is committed before it is used.

    A commit survives a killed process, but is not fsynced: a power cut may take the last ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise CheckpointError(
                    f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}. "
                    "Use the program version that wrote it."
                )
            self._connection.execute(_SCHEMA)
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise CheckpointError(
                f"{path} cannot be used: {error}. Free disk space, or move the "
                "file away to start with an empty library."
            ) from error

    async def add(self, problem: Problem, *, version: int) -> None:
        """Append one task and commit: a killed process loses nothing that was accepted."""
        pairs = json.dumps([asdict(pair) for pair in problem.pairs])
        row = (problem.task, problem.program, pairs, problem.shown_pairs, problem.message, version)
        try:
            self._connection.execute(
                "INSERT INTO tasks (task, program, pairs, shown, message, version) VALUES (?, ?, ?, ?, ?, ?)", row
            )
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def forget_after(self, version: int) -> None:
        """Delete, all at once, the tasks that were found under newer weights: a resumed run finds tasks of its own."""
        try:
            self._connection.execute("DELETE FROM tasks WHERE version > ?", (version,))
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def problems(self) -> list[Problem]:
        """All tasks, oldest first."""
        with closing(
            self._connection.execute("SELECT task, program, pairs, shown, message FROM tasks ORDER BY id")
        ) as rows:
            return [
                Problem(
                    task=task,
                    program=program,
                    pairs=tuple(Pair(**pair) for pair in json.loads(pairs)),
                    shown_pairs=shown,
                    message=message,
                )
                for task, program, pairs, shown, message in rows
            ]

    def _unwritable(self, error: sqlite3.Error) -> CheckpointError:
        return CheckpointError(
            f"{self._path} cannot be written: {error}. Free disk space, then continue with --resume, "
            "or start again if there is no checkpoint yet."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()
