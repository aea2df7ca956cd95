"""An observer of a run that trusts nothing of it: remembers what the journal has acknowledged, and compares.

It reads `journal.sqlite` as any other program may, while the run writes it. What a committed transaction shows has been
promised: a task that was seen once must be there, unchanged, for ever, and a sample that was seen trained in one step
must not be trained in another, unless the run went back to a checkpoint before that step.
"""

import asyncio
import hashlib
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

JOURNAL: Final = "journal.sqlite"
LOOK_SECONDS: Final = 0.25
BUSY_SECONDS: Final = 2.0

SampleId = tuple[int, str, int]


@dataclass(frozen=True, slots=True)
class Books:
    """What a journal says at one moment."""

    tasks: dict[int, str]
    """Digest of each task, by its row."""
    trained: dict[SampleId, int]
    """The step of every sample that is trained."""
    admitted: dict[SampleId, int]
    """The step of every sample that is in a batch and not yet trained."""
    per_step: Counter[int]
    """How many samples were trained in each step, those included whose rows were summed up."""


@dataclass(slots=True)
class Memory:
    """What was seen in the journal, and what contradicts it."""

    tasks: dict[int, str] = field(default_factory=dict)
    trained: dict[SampleId, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    looks: int = 0
    """How often the journal was read."""
    _back_at: int | None = None
    """The run is going back to this step: the journal may still tell of later ones that are to be undone."""
    _is_cut: bool = False
    """Metrics of later steps are gone; once there are new ones, the journal has been rolled back as well."""

    def hear(self, last_step: int) -> None:
        """The last step that metrics.jsonl has."""
        if self._back_at is not None:
            if self._is_cut and last_step > self._back_at:
                self._back_at = None
            self._is_cut = self._is_cut or last_step <= (self._back_at or 0)

    def compare(self, books: Books) -> None:
        """Take in what the journal says now. What it no longer says, or says differently, is a violation."""
        self.looks += 1
        limit = self._back_at
        trained = {sample: step for sample, step in books.trained.items() if limit is None or step <= limit}
        lost = [number for number, digest in self.tasks.items() if books.tasks.get(number) != digest]
        if lost:
            self._violated(f"{len(lost)} acknowledged tasks are gone or changed, the first is row {lost[0]}")
        again = [sample for sample, step in trained.items() if self.trained.get(sample, step) != step]
        if again:
            sample = again[0]
            steps = f"step {self.trained[sample]} and in step {trained[sample]}"
            self._violated(f"{len(again)} samples were trained twice, the first is {sample}, in {steps}")
        self.tasks |= books.tasks
        self.trained |= trained

    def went_back_to(self, step: int) -> None:
        """The run goes on from weights that contain steps 1 to `step`: what was trained later is not in them."""
        self.trained = {sample: at for sample, at in self.trained.items() if at <= step}
        self._back_at, self._is_cut = step, False

    def is_over(self) -> None:
        """The run has ended well: the journal tells of nothing that is still to be undone."""
        self._back_at = None

    def _violated(self, text: str) -> None:
        if text not in self.violations:
            self.violations.append(text)


def read_books(path: Path) -> Books:
    """Raises sqlite3.Error when the journal cannot be read, or is damaged."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as journal:
        journal.execute("BEGIN")  # one moment for all that is read
        tasks = {
            number: hashlib.sha256(repr(content).encode()).hexdigest()
            for number, *content in journal.execute("SELECT id, task, program, pairs FROM tasks")
        }
        sums = journal.execute("SELECT step, sum(samples) FROM sums WHERE stage = 'trained' GROUP BY step")
        books = Books(tasks, {}, {}, Counter(dict(sums)))
        rows = "SELECT group_id, role, number, stage, step FROM samples WHERE stage IN ('trained', 'admitted')"
        for group_id, role, number, stage, step in journal.execute(rows):
            (books.trained if stage == "trained" else books.admitted)[group_id, role, number] = step
    return books


def final_books(run_dir: Path) -> Books:
    """What the journal says when nobody writes it any more; read from a copy, so that it stays as it was left.

    Raises sqlite3.Error when it is damaged.
    """
    with _copied(run_dir) as journal:
        with closing(sqlite3.connect(journal)) as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
        return read_books(journal)


async def observe(run_dir: Path, memory: Memory, last_step: Callable[[], int]) -> None:
    """Look into the journal again and again, until cancelled. `last_step` is the last one that metrics.jsonl has."""
    while True:
        memory.hear(last_step())
        if (run_dir / JOURNAL).exists():
            with suppress(sqlite3.Error):  # being written, recovered or not there yet: the next look will tell
                memory.compare(await asyncio.to_thread(read_books, run_dir / JOURNAL))
        await asyncio.sleep(LOOK_SECONDS)  # SQLite tells other programs nothing of its writes


@contextmanager
def _copied(run_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="azr-faults-") as folder:
        for path in run_dir.glob(f"{JOURNAL}*"):
            if not path.name.endswith("-shm"):  # made anew from the log
                shutil.copyfile(path, Path(folder) / path.name)
        yield Path(folder) / JOURNAL
