"""The tables of `journal.sqlite`, and how a file of an older version becomes one of this version (docs/journal.md)."""

import json
import sqlite3
from pathlib import Path
from typing import Final

from azr_async.algorithm.library import key_of
from azr_async.errors import CheckpointError

_TASKS: Final = """
CREATE TABLE tasks (
    id      INTEGER PRIMARY KEY,   -- in the order in which they were found
    task    TEXT NOT NULL,         -- deduction, abduction or induction
    program TEXT NOT NULL,
    pairs   TEXT NOT NULL,         -- JSON: [{"input", "output", "value"}, ...]
    shown   INTEGER NOT NULL,      -- pairs that solvers see
    message TEXT NOT NULL,
    version INTEGER NOT NULL       -- newest weights version when it was admitted
)"""

_USE_AND_LEDGER: Final = (
    "ALTER TABLE tasks ADD COLUMN key BLOB",  # digest of what makes two tasks the same
    "ALTER TABLE tasks ADD COLUMN group_id INTEGER",  # that proposed it; below 0 before the first step, NULL: given
    "ALTER TABLE tasks ADD COLUMN parents TEXT NOT NULL DEFAULT '[]'",  # JSON: ids of the tasks the proposer was shown
    "ALTER TABLE tasks ADD COLUMN draws INTEGER NOT NULL DEFAULT 0",  # times shown to a proposer or asked again
    "ALTER TABLE tasks ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE tasks ADD COLUMN successes INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE tasks ADD COLUMN reward REAL",  # of the proposer
    "ALTER TABLE tasks ADD COLUMN last_use INTEGER",  # newest weights version when it was drawn or attempted last
    "UPDATE tasks SET key = task_key(task, program, pairs)",
    # Older versions told tasks apart that are the same now: all rows stay, the first one has the key.
    "UPDATE tasks SET key = NULL WHERE id NOT IN (SELECT min(id) FROM tasks GROUP BY key)",
    "CREATE UNIQUE INDEX tasks_by_key ON tasks (key)",
    """
CREATE TABLE groups (
    id          INTEGER PRIMARY KEY,
    task        TEXT NOT NULL,
    is_proposal INTEGER NOT NULL,  -- 0: a task of the library is solved again
    attempts    INTEGER NOT NULL,  -- solver samples that are trained on
    version     INTEGER NOT NULL   -- newest weights version when it was leased
)""",
    """
CREATE TABLE samples (
    group_id INTEGER NOT NULL,
    role     TEXT NOT NULL,        -- propose or solve
    number   INTEGER NOT NULL,
    version  INTEGER NOT NULL,     -- newest weights version when it was leased
    stage    TEXT NOT NULL,        -- leased, returned, judged, admitted, trained or dropped
    reward   REAL,
    step     INTEGER,              -- in which it was admitted, trained or dropped
    reason   TEXT NOT NULL,        -- why it was dropped
    PRIMARY KEY (group_id, role, number)
) WITHOUT ROWID""",
)

_SUMS: Final = (
    """
CREATE TABLE steps (
    step    INTEGER NOT NULL,
    stage   TEXT NOT NULL,         -- trained or dropped
    reason  TEXT NOT NULL,
    samples INTEGER NOT NULL,      -- that have no row in samples any more
    PRIMARY KEY (step, stage, reason)
) WITHOUT ROWID""",
    """
CREATE TABLE closed (
    task        TEXT NOT NULL,
    is_proposal INTEGER NOT NULL,
    newest      INTEGER NOT NULL,  -- all groups of this kind up to this number are closed for ever
    groups      INTEGER NOT NULL,  -- of them that there were
    samples     INTEGER NOT NULL,
    PRIMARY KEY (task, is_proposal)
) WITHOUT ROWID""",
    """
CREATE VIEW sums AS
SELECT step, stage, reason, sum(samples) AS samples FROM (
    SELECT step, stage, reason, samples FROM steps
    UNION ALL SELECT step, stage, reason, count(*) FROM samples GROUP BY step, stage, reason
) GROUP BY step, stage, reason""",
)

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = ((_TASKS,), _USE_AND_LEDGER, _SUMS)
"""The statements that make version n + 1 of version n, one transaction each."""

SCHEMA_VERSION: Final = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the file to this program's version; a crash leaves it at one version or the next, never between.

    Raises CheckpointError when it was written by a newer program.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, this program reads up to {SCHEMA_VERSION}. "
            "Use the program version that wrote it."
        )
    connection.create_function("task_key", 3, _key_of_row, deterministic=True)
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()  # another program may have been quicker
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _key_of_row(task: str, program: str, pairs: str) -> bytes:
    return key_of(task, program, [pair["input"] for pair in json.loads(pairs)])
