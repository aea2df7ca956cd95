"""What is written into the journal, and read back: tasks, what became of them, and the ledger."""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from azr_async.adapters.journal.pruning import Pruning
from azr_async.adapters.journal.schema import migrate
from azr_async.adapters.journal.statements import (
    ADD_TASK,
    DROP_PARTS,
    ROLL_BACK,
    TAKE_OVER,
    admission_of,
    ids_of,
    problem_of,
    record,
    use,
)
from azr_async.adapters.journal.writer import END_SECONDS, Work, Writer
from azr_async.algorithm.ledger import Changes, Entry, SampleId, Stage
from azr_async.algorithm.library import KnownTask, TaskUse, task_key
from azr_async.errors import AzrError, CheckpointError
from azr_async.messages import Admission, Problem, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundTask:
    """A row of the library: a task, and when and by whom it was found."""

    number: int
    """Of its row: in the order in which they were written."""
    problem: Problem
    version: int
    group_id: int | None


class SqliteJournal:
    """Fulfils ports.Journal, and keeps the ledger.

    What `add` and `flush` have returned from survives a killed process and a power cut.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file is damaged, cannot be written, or is of a newer program."""
        self._path = path
        connection = _opened(path)
        (self.newest_task,) = connection.execute("SELECT coalesce(max(id), 0) FROM tasks").fetchone()
        """The row of the task that was written last."""
        self._writer = Writer(connection, path)
        self._pruning = Pruning(lambda work: self._writer.put(work, is_awaited=False))
        self._ledger_rows = 0

    async def add(
        self, problem: Problem, *, version: int, group_id: int | None = None, parents: Collection[Problem] = ()
    ) -> None:
        """Keep a task; returns when it is on the disk. One that is there already stays as it is."""
        pairs = json.dumps([asdict(pair) for pair in problem.pairs])
        row = (problem.task, problem.program, pairs, problem.shown_pairs, problem.message, version)
        keys = [task_key(parent) for parent in parents]

        def insert(connection: sqlite3.Connection) -> None:
            shown = json.dumps(ids_of(connection, keys))
            added = connection.execute(ADD_TASK, (*row, task_key(problem), group_id, shown))
            if added.rowcount:
                self.newest_task = added.lastrowid

        await self._committed(insert)

    def record(self, changes: Changes) -> None:
        """Write down what the ledger has taken, within a moment; `flush` waits until it is on the disk."""
        if not changes.groups and not changes.samples:
            return
        self._ledger_rows += len(changes.groups) + len(changes.samples)
        self._writer.put(lambda connection: record(connection, changes), is_awaited=False)

    def note_use(self, tasks: Iterable[KnownTask]) -> None:
        """Write down how tasks have been used so far, within a moment."""
        used = list(tasks)
        if used:
            self._writer.put(lambda connection: use(connection, used), is_awaited=False)

    async def flush(self) -> None:
        """Return when all that was written before is on the disk."""
        await self._committed(lambda connection: None)

    def roll_back(self, version: int) -> None:
        """Make the ledger that of a run which goes on from a checkpoint of `version` (algorithm/ledger.py).

        Raises CheckpointError when what these weights do not contain has been summed up.
        """
        ((newest,),) = self._rows("SELECT coalesce(max(step), 0) FROM steps")
        if newest > version:
            raise CheckpointError(
                f"{self._path} has summed up what became of the samples up to step {newest}: no run can go on with it "
                f"from step {version}. Resume from a newer checkpoint, or start a new run from this one with --model."
            )

        def statements(connection: sqlite3.Connection) -> None:
            for statement in ROLL_BACK:
                connection.execute(statement, {"version": version})

        self._now(statements)

    def take_over(self, version: int, held: Collection[int]) -> None:
        """Make the ledger that of a learner which goes on (`taken_over` in algorithm/ledger.py)."""

        def statements(connection: sqlite3.Connection) -> None:
            for statement in TAKE_OVER:
                connection.execute(statement, {"version": version, "held": json.dumps(sorted(held))})

        self._now(statements)

    def admitted(self) -> list[tuple[SampleId, Entry, Task]]:
        """The samples of batches that are not in the installed weights yet, with the kind of their group."""
        rows = self._rows("""
SELECT group_id, role, number, samples.version, reward, step, task FROM samples JOIN groups ON groups.id = group_id
WHERE stage = 'admitted'""")
        return [
            (SampleId(group, role, number), Entry(version=version, stage="admitted", reward=reward, step=step), task)
            for group, role, number, version, reward, step, task in rows
        ]

    def uses(self) -> dict[bytes, TaskUse]:
        """How the tasks have been used, by key, in the order in which they were found."""
        rows = self._rows("""
SELECT key, draws, attempts, successes, reward, last_use FROM tasks WHERE key IS NOT NULL ORDER BY id""")
        return {
            key: TaskUse(draws=draws, attempts=attempts, successes=successes, reward=reward, last_use=last_use)
            for key, draws, attempts, successes, reward, last_use in rows
        }

    def problems(self) -> list[Problem]:
        """All tasks, oldest first."""
        return [found.problem for found in self.tasks()]

    def tasks(self) -> list[FoundTask]:
        """All tasks with what is known of their origin, oldest first."""
        rows = self._rows("SELECT id, version, group_id, task, program, pairs, shown, message FROM tasks ORDER BY id")
        return [
            FoundTask(number=number, problem=problem_of(*content), version=version, group_id=group_id)
            for number, version, group_id, *content in rows
        ]

    def samples(self) -> dict[SampleId, Entry]:
        """The whole ledger."""
        rows = self._rows("SELECT group_id, role, number, version, stage, reward, step, reason FROM samples")
        return {
            SampleId(group_id, role, number): Entry(version=version, stage=stage, reward=reward, step=step, reason=why)
            for group_id, role, number, version, stage, reward, step, why in rows
        }

    def left_groups(self, version: int) -> list[Admission]:
        """After `roll_back`: the groups to start anew, oldest first. Of those that are in the weights in part, the rest
        is dropped: it would need what only the process had that was to make it."""
        why = {"version": version, "reason": "its group was trained or dropped in part when the run was resumed"}
        self._now(lambda connection: connection.execute(DROP_PARTS, why))
        rows = self._rows("""
SELECT id, task, is_proposal, attempts, version FROM groups
WHERE id IN (SELECT group_id FROM samples WHERE stage = 'leased') ORDER BY id""")
        return [admission_of(*row) for row in rows]

    def newest_groups(self) -> Mapping[tuple[Task, bool], int]:
        """The largest number of a group, by task and `is_proposal`."""
        rows = self._rows("""
SELECT task, is_proposal, max(newest) FROM (
    SELECT task, is_proposal, newest FROM closed UNION ALL SELECT task, is_proposal, id FROM groups
) GROUP BY task, is_proposal""")
        return {(task, bool(is_proposal)): number for task, is_proposal, number in rows}

    def sum_up(self, step: int) -> None:
        """Keep only sums of the samples that ended in the steps up to this one, from now on and bit by bit.

        The run must never go on from weights of an earlier version.
        """
        self._writer.put(lambda connection: self._pruning.up_to(connection, step), is_awaited=False)

    def sums(self) -> Counter[tuple[int | None, Stage, str]]:
        """How many samples there ever were, by step, stage and reason."""
        rows = self._rows("SELECT step, stage, reason, samples FROM sums")
        return Counter({(step, stage, reason): samples for step, stage, reason, samples in rows})

    def close(self) -> None:
        """Write what is left. Raises what could not be written, or CheckpointError when that takes too long."""
        self._writer.close()

    def numbers(self) -> dict[str, float]:
        """Since the start: batches written, CPU seconds that it took, samples and groups that went into them."""
        return {
            "commits": float(self._writer.commits),
            "cpu_seconds": self._writer.cpu_seconds,
            "ledger_rows": float(self._ledger_rows),
        }

    async def _committed(self, work: Work) -> None:
        done = self._writer.put(work, is_awaited=True)
        try:
            async with asyncio.timeout(END_SECONDS):
                await asyncio.wrap_future(done)
        except TimeoutError:
            raise self._silent() from None

    def _rows(self, query: str) -> list[Any]:
        rows: list[Any] = []
        self._now(lambda connection: rows.extend(connection.execute(query).fetchall()))
        return rows

    def _now(self, work: Work) -> None:
        """For the moments before and after a run: wait here, and not in the event loop."""
        try:
            self._writer.put(work, is_awaited=True).result(END_SECONDS)
        except TimeoutError:
            raise self._silent() from None

    def _silent(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} did not take a write within {END_SECONDS:g} s. Look whether its disk answers, or whether "
            "another program has locked the file, then continue with --resume."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        with nullcontext() if kind is None else suppress(AzrError):  # it must not hide what has gone wrong first
            self.close()


def _opened(path: Path) -> sqlite3.Connection:
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=END_SECONDS)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # with a WAL: one fsync per commit
        migrate(connection, path)
    except (sqlite3.Error, CheckpointError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} cannot be used: {error}. Free disk space, or move the file away to start with an empty library."
        ) from error
    return connection
