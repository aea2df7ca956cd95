"""Do memory and descriptors of every process of a run stay flat? One long run, looked at from outside.

A run of as many steps as fit the time; every ten seconds memory, descriptors and threads of each process that carries
the run's folder in its command line. Memory is the kernel's proportional share: a page of several processes counts
once in their sum. The sandbox's zygotes and parsers count as one; how many they are is shown beside. The first fifth is
warm-up; of the rest, the table shows the medians of its first and last quarter, and the growth in an hour. The JSON
has the memory of every look, too: what has come to its end shows a curve that bends. Self-play holds the library and
the ledger's latest steps, and remembers what programs gave, all of them bounded; small ones are full soon:

    python benchmarks/soak.py --output benchmarks/results/soak.json -- --library.capacity 500 \
        --journal.keep-steps 200 --sandbox.cache-mb 8
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from whole_runs import REPOSITORY, read_lines, write_json

LOOK_SECONDS = 10.0
END_SECONDS = 120.0
WARM_UP_SHARE = 0.2

Seen = tuple[float, int, int, int]
Sample = dict[str, Seen]
"""By name: MB, descriptors, threads, processes of that name."""
NOTHING: Seen = (0.0, 0, 0, 0)


def main() -> None:
    """Run, look, and print."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        samples, lines = soak(Path(scratch) / "run", 60.0 * arguments.minutes, arguments.options)
    rows = summary(samples)
    show(rows)
    trained = lines[-1]
    print(f"{trained['step']} steps in {trained['wall_seconds']:.0f} s, library {trained['library']}")
    results = {"minutes": arguments.minutes, "options": arguments.options, "steps": trained["step"], "processes": rows}
    results |= {"library": libraries(lines), "megabytes": series(samples)}
    write_json(arguments.output, "soak", results)


def soak(run_dir: Path, seconds: float, options: list[str]) -> tuple[list[Sample], list[dict[str, Any]]]:
    """A run that is stopped after so many seconds; what was seen of it, and its lines."""
    command = [sys.executable, str(REPOSITORY / "run.py"), "--output", str(run_dir), "--steps", "1000000", *options]
    samples, began = list[Sample](), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while time.monotonic() < began + seconds and run.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                run.wait(LOOK_SECONDS)
            samples.append(look(run_dir))
            Console(stderr=True).print(f"{time.monotonic() - began:5.0f} s of {seconds:.0f}", end="\r")
        if run.poll() is not None:
            raise SystemExit(f"the run ended by itself with status {run.returncode}; see what it said above.")
        run.send_signal(signal.SIGINT)
        run.wait(END_SECONDS)
    return samples, read_lines(run_dir / "metrics.jsonl")


def look(run_dir: Path) -> Sample:
    """Every process of the run, now."""
    seen: defaultdict[str, Seen] = defaultdict(lambda: NOTHING)
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not any(str(run_dir) in word for word in words):
            continue
        with suppress(psutil.Error):
            name, memory = _name(words), process.memory_full_info().pss / 2**20
            mb, descriptors, threads, processes = seen[name]
            new = (mb + memory, descriptors + process.num_fds(), threads + process.num_threads(), processes + 1)
            seen[name] = new
    return dict(seen)


def _name(words: list[str]) -> str:
    modules = [word for word in words if word.startswith("azr_async.programs.")]
    if modules:
        return modules[-1].rpartition(".")[2]  # the first one is the leash of all
    return "launcher" if any(word.endswith("run.py") for word in words) else "sandbox"


def summary(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Medians of the first and last quarter after the warm-up, by process."""
    steady = samples[int(len(samples) * WARM_UP_SHARE) :]
    quarter = max(1, len(steady) // 4)
    hours = (len(steady) - quarter) * LOOK_SECONDS / 3600
    rows = {}
    for name in sorted(steady[0]):
        columns = [[sample.get(name, NOTHING)[column] for sample in steady] for column in range(len(NOTHING))]
        first, last = ([statistics.median(part) for part in parts] for parts in _ends(columns, quarter))
        rows[name] = {
            "mb_first": first[0],
            "mb_last": last[0],
            "mb_per_hour": (last[0] - first[0]) / hours if hours else 0.0,
            "descriptors_first": first[1],
            "descriptors_last": last[1],
            "threads_first": first[2],
            "threads_last": last[2],
            "processes_first": first[3],
            "processes_last": last[3],
        }
    return rows


def _ends(columns: list[list[float]], quarter: int) -> tuple[list[list[float]], list[list[float]]]:
    return [column[:quarter] for column in columns], [column[-quarter:] for column in columns]


def libraries(lines: list[dict[str, Any]]) -> list[int]:
    """Tasks, at ten moments of the run; the line of an evaluation before the first step has none."""
    sizes = [sum(line["library"].values()) for line in lines if line["step"]]
    return [sizes[moment * (len(sizes) - 1) // 9] for moment in range(10)]


def series(samples: list[Sample]) -> dict[str, list[float]]:
    """MB of each process at every look."""
    return {name: [round(sample.get(name, NOTHING)[0], 1) for sample in samples] for name in sorted(samples[-1])}


def show(rows: dict[str, dict[str, float]]) -> None:
    """First and last, side by side."""
    table = Table("process", "MB first", "MB last", "MB an hour", "descriptors", "threads", "processes")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['mb_first']:.1f}",
            f"{row['mb_last']:.1f}",
            f"{row['mb_per_hour']:+.1f}",
            f"{row['descriptors_first']:.0f} -> {row['descriptors_last']:.0f}",
            f"{row['threads_first']:.0f} -> {row['threads_last']:.0f}",
            f"{row['processes_first']:.0f} -> {row['processes_last']:.0f}",
        )
    Console(width=110).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    parser.add_argument("options", nargs="*", help="of run.py, after --")
    return parser


if __name__ == "__main__":
    main()
