"""What the journal costs by itself, at the rates of a run: CPU per step, acknowledgements, and the growth of the file.

    python benchmarks/journal.py --steps 3000 --keep-steps 500

Each step leases, judges and trains about as many samples as one of the starter's (306) and finds some tasks; every 60
steps what a checkpoint allows is summed up. It runs as fast as the disk takes it, so the latencies are those under
full load.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.ledger import Ledger, samples_of
from azr_async.algorithm.values import encode
from azr_async.messages import TASKS, Admission, Pair, Problem

GROUPS_PER_STEP, ATTEMPTS, TASKS_PER_STEP, CHECKPOINT_STEPS, CHECKPOINTS = 36, 8, 12, 60, 2
REPORT_STEPS = 500


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


def one_step(ledger: Ledger, journal: SqliteJournal, step: int) -> None:
    """What the ledger is told of a step, and the journal of the ledger."""
    groups = groups_of(step)
    for group in groups:
        ledger.lease(group)
    for sample in [sample for group in groups for sample in samples_of(group)]:
        ledger.returned(sample)
        ledger.judged(sample, 1.0)
        ledger.admitted(sample, version=step - 1)
    journal.record(ledger.take())
    ledger.installed(step)
    journal.record(ledger.take())


async def measure(path: Path, *, steps: int, keep_steps: int) -> None:
    """Print a line every few hundred steps."""
    ledger, waits = Ledger(), list[float]()
    with SqliteJournal(path) as journal:
        before, began, cpu_began = journal.numbers(), time.perf_counter(), time.process_time()
        for step in range(1, steps + 1):
            one_step(ledger, journal, step)
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


def megabytes(path: Path) -> float:
    """Of the file without its WAL."""
    return path.stat().st_size / 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--keep-steps", type=int, default=500, help="journal.keep_steps of the run that is played")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        asyncio.run(measure(path, steps=arguments.steps, keep_steps=arguments.keep_steps))


if __name__ == "__main__":
    main()
