"""The statements of the journal, and its rows as what they stand for."""

import json
import sqlite3
from typing import Final

from azr_async.algorithm.ledger import Changes, closed_twice
from azr_async.messages import Admission, Pair, Problem, Task

ADD_TASK: Final = """
INSERT INTO tasks (task, program, pairs, shown, message, version, key, group_id, parents)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"""
_ADD_GROUP: Final = """
INSERT INTO groups (id, task, is_proposal, attempts, version) SELECT ?1, ?2, ?3, ?4, ?5
WHERE NOT EXISTS (SELECT 1 FROM closed WHERE task = ?2 AND is_proposal = ?3 AND newest >= ?1) ON CONFLICT DO NOTHING"""
_PUT_SAMPLE: Final = """
INSERT INTO samples (group_id, role, number, version, stage, reward, step, reason) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8
WHERE EXISTS (SELECT 1 FROM groups WHERE id = ?1)
ON CONFLICT DO UPDATE SET version = excluded.version, stage = excluded.stage, reward = excluded.reward,
    step = excluded.step, reason = excluded.reason
WHERE stage NOT IN ('trained', 'dropped')"""
USE_TASK: Final = """
UPDATE tasks SET draws = ?, attempts = ?, successes = ?, reward = ?, last_use = ? WHERE key = ?"""
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
    connection.executemany(
        _ADD_GROUP,
        [
            (group.group_id, group.task, group.is_proposal, group.trained_attempts, group.version)
            for group in changes.groups
        ],
    )
    rows = [
        (*sample, entry.version, entry.stage, entry.reward, entry.step, entry.reason)
        for sample, entry in changes.samples.items()
    ]
    if connection.executemany(_PUT_SAMPLE, rows).rowcount < len(rows):
        raise closed_twice("a sample")


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
