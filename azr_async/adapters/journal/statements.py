"""The statements of the journal, and its rows as what they stand for."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Final

from azr_async.algorithm.ledger import Changes, closed_twice
from azr_async.algorithm.library import KnownTask, task_key
from azr_async.messages import Admission, Pair, Problem, Task

ADD_TASK: Final = """
INSERT INTO tasks (task, program, pairs, shown, message, version, key, group_id, parents)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"""
_ADD_GROUPS: Final = """
INSERT INTO groups (id, task, is_proposal, attempts, version)
WITH given (id, task, is_proposal, attempts, version) AS (VALUES {rows}) SELECT * FROM given
WHERE NOT EXISTS (
    SELECT 1 FROM closed WHERE task = given.task AND is_proposal = given.is_proposal AND newest >= given.id
) ON CONFLICT DO NOTHING"""
_PUT_SAMPLES: Final = """
INSERT INTO samples (group_id, role, number, version, stage, reward, step, reason)
WITH given (group_id, role, number, version, stage, reward, step, reason) AS (VALUES {rows}) SELECT * FROM given
WHERE EXISTS (SELECT 1 FROM groups WHERE id = given.group_id)
ON CONFLICT DO UPDATE SET version = excluded.version, stage = excluded.stage, reward = excluded.reward,
    step = excluded.step, reason = excluded.reason
WHERE stage NOT IN ('trained', 'dropped')"""
_USE_TASKS: Final = """
WITH given (draws, attempts, successes, reward, last_use, key) AS (VALUES {rows})
UPDATE tasks SET (draws, attempts, successes, reward, last_use) = (
    SELECT draws, attempts, successes, reward, last_use FROM given WHERE given.key = tasks.key
) WHERE key IN (SELECT key FROM given)"""
_ROWS_AT_ONCE: Final = 64
"""SQLite takes at least 999 parameters."""
ROLL_BACK: Final = (
    "DELETE FROM samples WHERE version >= :version",
    "DELETE FROM groups WHERE version >= :version",
    "UPDATE samples SET stage = 'trained' WHERE stage = 'admitted' AND step <= :version",
    """
UPDATE samples SET stage = 'leased', reward = NULL, step = NULL, reason = ''
WHERE step IS NULL OR step > :version""",
)
TAKE_OVER: Final = (
    "UPDATE samples SET stage = 'trained' WHERE stage = 'admitted' AND step <= :version",
    """
UPDATE samples SET stage = 'leased', reward = NULL, step = NULL, reason = ''
WHERE stage NOT IN ('trained', 'dropped')
    AND (step IS NULL OR step - 1 NOT IN (SELECT value FROM json_each(:held)))""",
)
DROP_PARTS: Final = """
UPDATE samples SET stage = 'dropped', step = :version + 1, reason = :reason
WHERE stage = 'leased'
    AND group_id IN (SELECT group_id FROM samples WHERE stage IN ('admitted', 'trained', 'dropped'))"""


def record(connection: sqlite3.Connection, changes: Changes) -> None:
    """Groups first: a sample without the row of its group belongs to one that was summed up.

    Raises TrainingError when a sample is closed.
    """
    _execute(
        connection,
        _ADD_GROUPS,
        [
            (group.group_id, group.task, group.is_proposal, group.trained_attempts, group.version)
            for group in changes.groups
        ],
    )
    rows = [
        (*sample, entry.version, entry.stage, entry.reward, entry.step, entry.reason)
        for sample, entry in changes.samples.items()
    ]
    if _execute(connection, _PUT_SAMPLES, rows) < len(rows):
        raise closed_twice("a sample")


def use(connection: sqlite3.Connection, tasks: Iterable[KnownTask]) -> None:
    """How these tasks have been used so far."""
    rows = [
        (
            task.use.draws,
            task.use.attempts,
            task.use.successes,
            task.use.reward,
            task.use.last_use,
            task_key(task.problem),
        )
        for task in tasks
    ]
    _execute(connection, _USE_TASKS, rows)


def _execute(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> int:
    """Execute it with all rows, no two of one key; returns how many rows an INSERT has changed.

    Many rows are one step of SQLite: between two steps, as `executemany` makes one for each row, another thread that is
    busy keeps Python to itself for 5 ms.
    """
    changed = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        marks = ", ".join([f"({', '.join('?' * len(part[0]))})"] * len(part))
        changed += connection.execute(statement.format(rows=marks), [value for row in part for value in row]).rowcount
    return changed


def ids_of(connection: sqlite3.Connection, keys: list[bytes]) -> list[int]:
    """Of the tasks with these keys; the identity function, which nobody has found, has none."""
    marks = ", ".join("?" * len(keys))
    return [number for (number,) in connection.execute(f"SELECT id FROM tasks WHERE key IN ({marks})", keys)]


def problem_of(task: Task, program: str, pairs: str, shown: int, message: str) -> Problem:
    """Of these columns of `tasks`."""
    return Problem(
        task=task,
        program=program,
        pairs=tuple(Pair(**pair) for pair in json.loads(pairs)),
        shown_pairs=shown,
        message=message,
    )


def admission_of(number: int, task: Task, is_proposal: int, attempts: int, version: int) -> Admission:
    """Of a row of `groups`."""
    return Admission(
        group_id=number, task=task, is_proposal=bool(is_proposal), trained_attempts=attempts, version=version
    )
