"""What the journal costs by itself, at the rates of a run: CPU per step, acknowledgements, and the growth of the file.

    python benchmarks/journal.py --steps 3000 --keep-steps 500 --output benchmarks/results/journal.json

Each step leases, judges and trains about as many samples as one of the starter's (306) and finds some tasks; every 60
steps what a checkpoint allows is summed up. It runs as fast as the disk takes it, so the latencies are those under
full load. At last the writer alone has the rows of some steps to write, first with Python to itself, then beside a
thread that never pauses, as the event loop is when much arrives: each batch of a run waits for the writer.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

from whole_runs import write_json

from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.ledger import Changes, Ledger, samples_of
from azr_async.algorithm.values import encode
from azr_async.messages import TASKS, Admission, Pair, Problem

GROUPS_PER_STEP, ATTEMPTS, TASKS_PER_STEP, CHECKPOINT_STEPS, CHECKPOINTS = 36, 8, 12, 60, 2
REPORT_STEPS, QUEUED_STEPS, REPEATS = 500, 10, 5


def groups_of(step: int) -> list[Admission]:
    """The groups that are started before this step."""
    return [
        Admission(
            group_id=GROUPS_PER_STEP * step + number,
            task=TASKS[number % 3],
            is_proposal=number % 2 == 0,
            trained_attempts=ATTEMPTS,
            version=step - 1,
        )
        for number in range(GROUPS_PER_STEP)
    ]


def task_of(number: int) -> Problem:
    """A task that no other is equal to."""
    pair = Pair(input="1", output=str(number), value=encode(number))
    return Problem(task="deduction", program=f"def f(x):\n    return x * {number}", pairs=(pair,))


async def find_tasks(journal: SqliteJournal, step: int) -> list[float]:
    """Seconds until each was acknowledged; all are found at once."""

    async def find(number: int) -> float:
        began = time.perf_counter()
        await journal.add(task_of(number), version=step - 1, group_id=GROUPS_PER_STEP * step)
        return time.perf_counter() - began

    first = TASKS_PER_STEP * step
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(find(number)) for number in range(first, first + TASKS_PER_STEP)]
    return [task.result() for task in tasks]


def one_step(ledger: Ledger, step: int) -> tuple[Changes, Changes]:
    """What the ledger is told of a step; what the journal is told of the ledger, before the step and after it."""
    groups = groups_of(step)
    for group in groups:
        ledger.lease(group)
    for sample in [sample for group in groups for sample in samples_of(group)]:
        ledger.returned(sample)
        ledger.judged(sample, 1.0)
        ledger.admitted(sample, version=step - 1)
    before = ledger.take()
    ledger.installed(step)
    return before, ledger.take()


async def measure(path: Path, *, steps: int, keep_steps: int) -> None:
    """Print a line every few hundred steps."""
    ledger, waits = Ledger(), list[float]()
    with SqliteJournal(path) as journal:
        before, began, cpu_began = journal.numbers(), time.perf_counter(), time.process_time()
        for step in range(1, steps + 1):
            for changes in one_step(ledger, step):
                journal.record(changes)
            waits += await find_tasks(journal, step)
            if step % CHECKPOINT_STEPS == 0:
                journal.sum_up(min(step - CHECKPOINTS * CHECKPOINT_STEPS, step - keep_steps))
            if step % REPORT_STEPS == 0:
                now, seconds = journal.numbers(), time.perf_counter() - began
                rows = now["ledger_rows"] - before["ledger_rows"]
                print(
                    f"step {step}: {rows / seconds:.0f} rows/s, CPU per step "
                    f"{(now['cpu_seconds'] - before['cpu_seconds']) / REPORT_STEPS * 1e3:.1f} ms in the writer, "
                    f"{(time.process_time() - cpu_began) / REPORT_STEPS * 1e3:.1f} ms in all; acknowledged after "
                    f"{statistics.median(waits) * 1e3:.1f} ms (median), {max(waits) * 1e3:.0f} ms (longest); "
                    f"file {megabytes(path):.1f} MB"
                )
                before, began, cpu_began = now, time.perf_counter(), time.process_time()
                waits.clear()
        await journal.flush()


async def rows_per_second(path: Path, *, is_beside_a_busy_thread: bool) -> float:
    """Of the ledger, from when they are handed over until all are on the disk."""
    ledger, is_over = Ledger(), threading.Event()
    queued = [changes for step in range(1, QUEUED_STEPS + 1) for changes in one_step(ledger, step)]
    busy = threading.Thread(target=_never_pause, args=(is_over,))
    with SqliteJournal(path) as journal:
        if is_beside_a_busy_thread:
            busy.start()
        try:
            began = time.perf_counter()
            for changes in queued:
                journal.record(changes)
            await journal.flush()
            return journal.numbers()["ledger_rows"] / (time.perf_counter() - began)
        finally:
            is_over.set()


def _never_pause(is_over: threading.Event) -> None:
    while not is_over.is_set():
        pass


def megabytes(path: Path) -> float:
    """Of the file without its WAL."""
    return path.stat().st_size / 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--keep-steps", type=int, default=500, help="journal.keep_steps of the run that is played")
    parser.add_argument("--output", type=Path, help="write what is written beside a busy thread as JSON")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"alone": [], "beside a busy thread": []}
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder) / "journal.sqlite", steps=arguments.steps, keep_steps=arguments.keep_steps))
        for repeat, name in itertools.product(range(REPEATS), rates):
            path = Path(folder) / f"{name} {repeat}.sqlite"
            rates[name].append(asyncio.run(rows_per_second(path, is_beside_a_busy_thread=name != "alone")))
    for name, same in rates.items():
        print(f"rows/s {name}: {statistics.median(same):,.0f} ({min(same):,.0f} to {max(same):,.0f})")
    write_json(arguments.output, "journal", rates)


if __name__ == "__main__":
    main()
