"""One thread that writes, in batches: many changes, one transaction, one fsync."""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from azr_async.errors import AzrError, CheckpointError

MOST_WRITES: Final = 256
"""A batch of so many commits at once."""
ACKNOWLEDGE_SECONDS: Final = 0.005
"""A batch that somebody waits for commits this long after its first write: what came meanwhile shares the fsync."""
GATHER_SECONDS: Final = 0.25
"""A batch that nobody waits for: a crash loses no more than this."""
END_SECONDS: Final = 60.0
"""Longest wait for a commit."""

Work = Callable[[sqlite3.Connection], object]
"""Its result is of no use to anybody."""


@dataclass(slots=True)
class _Write:
    work: Work
    is_awaited: bool
    done: "Future[None]" = field(default_factory=Future)


class Writer:
    """Owns the connection: everything that is done with it is done on its thread, in the order of the calls."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """The connection must be open to other threads, and not begin transactions by itself."""
        self.commits = 0
        self.cpu_seconds = 0.0
        """CPU time of the thread."""
        self._connection, self._path = connection, path
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._failure: AzrError | None = None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, work: Work, *, is_awaited: bool) -> "Future[None]":
        """Do `work` in the next batch. The future is done when that is on the disk, or has the reason why it is not.

        Raises what made an earlier batch fail: nothing is written after it.
        """
        if self._failure is not None:
            raise self._failure
        write = _Write(work, is_awaited)
        self._queue.put(write)
        return write.done

    def close(self) -> None:
        """Write what is left, and end the thread. Raises CheckpointError when that takes too long, or had failed."""
        self._queue.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            raise CheckpointError(
                f"{self._path} could not be written within {END_SECONDS:g} s. Look whether its disk answers, "
                "then continue with --resume."
            )
        self._connection.close()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch, is_open = self._gather()
            if batch:
                self._commit(batch)
                self.cpu_seconds = time.thread_time()

    def _gather(self) -> tuple[list[_Write], bool]:
        """The writes of the next batch, and whether there may be others after it."""
        first = self._queue.get()  # no deadline: nothing is owed to anybody here, and `close` ends it
        if first is None:
            return [], False
        batch, began = [first], time.monotonic()
        while len(batch) < MOST_WRITES:
            is_awaited = any(write.is_awaited for write in batch)
            end = began + (ACKNOWLEDGE_SECONDS if is_awaited else GATHER_SECONDS)
            try:
                write = self._queue.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if write is None:
                return batch, False
            batch.append(write)
        return batch, True

    def _commit(self, batch: list[_Write]) -> None:
        if self._failure is None:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                for write in batch:
                    write.work(self._connection)
                self._connection.execute("COMMIT")
                self.commits += 1
            except (sqlite3.Error, ValueError) as error:  # ValueError: a text that is no Unicode
                self._fail(_unwritable(self._path, error))
            except AzrError as error:
                self._fail(error)
        for write in batch:
            if not write.done.set_running_or_notify_cancel():  # nobody waits any more
                continue
            if self._failure is None:
                write.done.set_result(None)
            else:
                write.done.set_exception(self._failure)

    def _fail(self, error: AzrError) -> None:
        self._failure = error
        if self._connection.in_transaction:
            self._connection.rollback()


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error}. Free disk space, then continue with --resume, "
        "or start again if there is no checkpoint yet."
    )
