"""How many programs per second does the sandbox run, and what would be the most that processes allow?

Floors, measured in the same run: fork and wait alone (an empty child), a fresh interpreter per program - as
`python -c` starts it, the leanest one (`-I -S`), and the leanest one that gives its result as JSON, as a caller needs
it that must not evaluate it - and a loop that executes the programs in one process without any isolation. Then the
sandbox at 1 to all cores: trivial programs, ten inputs of one program per call, two runs that must agree, programs that
compute for 20 ms, and a mix in which every fiftieth program never ends. At last a soak: mixed programs by the thousand,
and what is left.

    python benchmarks/sandbox.py --output benchmarks/results/sandbox.json
"""

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from whole_runs import write_json

from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.messages import Outcome

IN_FLIGHT = 32
LABEL = f"benchmark-{os.getpid()}"
TRIVIAL = (
    "def f(x):\n    return sorted(x) + [{n}]",
    "from collections import Counter\ndef f(x):\n    return dict(Counter(x)), {n}",
    "def f(x):\n    a, b = 0, 1\n    for _ in range(30):\n        a, b = b, a + b\n    return a + {n}",
    "def f(x):\n    return ' '.join(map(str, x)).upper().split(), {n}",
)
COMPUTING = "import time\ndef f(x):\n    total = {n}\n    for i in range(x[0]):\n        total += i\n    return total"
ENDLESS = "def f(x):\n    while True:\n        pass\n# {n}"
INPUT = "[3, 1, 2]"
FORKS = """
import os
for _ in range({n}):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.wait4(child, 0)
"""

Measure = Callable[[SandboxPool, int], Awaitable[int]]
"""Runs so many programs; gives the number of executions."""


@dataclass(frozen=True)
class Measured:
    """One load at one number of workers."""

    load: str
    workers: int
    executions_per_second: float
    p50_ms: float
    p99_ms: float
    parent_microseconds: float
    """CPU time of the pool's own process for one execution."""
    cpu_microseconds: float
    """CPU time of all processes together for one execution; unlike a rate, it bears other work on the machine."""


def main() -> None:
    """Measure everything, repeats interleaved, print medians and ratios."""
    arguments = _parser().parse_args()
    floors: dict[str, list[tuple[float, float]]] = {}
    rows: list[Measured] = []
    for repeat in range(1, arguments.repeats + 1):
        for name, floor in FLOORS.items():
            floors.setdefault(name, []).append(timed(floor, arguments.programs))
        for workers in range(1, arguments.workers + 1):
            for name, measure in LOADS.items():
                row = uvloop.run(measured(name, measure, workers, arguments.programs))
                rows.append(row)
                progress = f"{repeat} of {arguments.repeats}: {name}, {workers} workers"
                print(f"{progress}: {row.executions_per_second:,.0f} a second", file=sys.stderr)
    soak = uvloop.run(soaked(arguments.soak, arguments.workers))
    medians = {
        name: {"executions_per_second": rate, "cpu_microseconds": cpu}
        for name, same in floors.items()
        for rate, cpu in [[statistics.median(column) for column in zip(*same, strict=True)]]
    }
    show(medians, rows, soak)
    write_json(arguments.output, "sandbox", {"floors": medians, "loads": [asdict(row) for row in rows], "soak": soak})


# ---------------------------------------------------------------- floors


def timed(floor: Callable[[int], int], count: int) -> tuple[float, float]:
    """Executions per second of wall time, and microseconds of CPU time for one."""
    started, cpu = time.perf_counter(), cpu_seconds()
    executions = floor(count)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return executions / seconds, 1e6 * cpu / executions


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def forks(count: int) -> int:
    """Fork, end, wait, in an interpreter that has loaded nothing."""
    count *= 5  # so that its start does not count
    subprocess.run([sys.executable, "-S", "-c", FORKS.format(n=count)], check=True, timeout=300)
    return count


def fresh_interpreters(count: int, ending: str = "print(repr(f({input})))", flags: Sequence[str] = ("-I", "-S")) -> int:
    """A new interpreter for every program, with nothing that slows its start."""
    count = max(10, count // 50)
    for number in range(count):
        program = f"{TRIVIAL[number % 4].format(n=number)}\n{ending.format(input=INPUT)}"
        subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, check=True, timeout=60)
    return count


def usual_interpreters(count: int) -> int:
    """The same, with what this environment has it import at its start."""
    return fresh_interpreters(count, flags=())


def fresh_interpreters_with_json(count: int) -> int:
    """The same, and the result is data that can be read without evaluating it."""
    return fresh_interpreters(count, "import json\nprint(json.dumps(repr(f({input}))))")


def unisolated(count: int) -> int:
    """Every program in this process: what no isolation costs."""
    for number in range(count):
        names: dict[str, Any] = {}
        exec(TRIVIAL[number % 4].format(n=number), names)
        repr(names["f"]([3, 1, 2]))
    return count


FLOORS: dict[str, Callable[[int], int]] = {
    "fork and wait, empty child": forks,
    "fresh interpreter, python -c": usual_interpreters,
    "fresh interpreter, bare": fresh_interpreters,
    "fresh interpreter, JSON": fresh_interpreters_with_json,
    "one process, no isolation": unisolated,
}

# ---------------------------------------------------------------- loads


async def run_all(pool: SandboxPool, programs: Sequence[str], text: str, times: int = 1) -> list[Outcome]:
    """Every program on one input, some side by side."""
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(program: str) -> Outcome:
        async with room:
            return (await pool.run(program, [text], times=times))[0]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(program)) for program in programs]
    return [task.result() for task in tasks]


def distinct(count: int) -> list[str]:
    """Trivial programs, no two the same, so that nothing is answered from memory."""
    return [TRIVIAL[number % 4].format(n=number) for number in range(count)]


def expect(outcomes: Sequence[Outcome], *, endless: int = 0) -> int:
    """The number of outcomes, if they are what they should be."""
    wrong = [outcome for outcome in outcomes if outcome.status not in ("ok", "timeout")]
    timeouts = sum(outcome.status == "timeout" for outcome in outcomes)
    if wrong or timeouts != endless:
        raise SystemExit(f"the measurement is void: {timeouts} timeouts, not {endless}; {wrong[:3]}")
    return len(outcomes)


async def trivial(pool: SandboxPool, count: int) -> int:
    return expect(await run_all(pool, distinct(count), INPUT))


async def twice(pool: SandboxPool, count: int) -> int:
    return expect(await run_all(pool, distinct(count // 2), INPUT, times=2))


async def ten_inputs(pool: SandboxPool, count: int) -> int:
    inputs = [str(list(range(number))) for number in range(1, 11)]
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(program: str) -> list[Outcome]:
        async with room:
            return await pool.run(program, inputs)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(program)) for program in distinct(count // 2)]
    return sum(expect(task.result()) for task in tasks)


async def computing(pool: SandboxPool, count: int) -> int:
    """About 20 ms each, by the speed of this machine."""
    started = time.perf_counter()
    total = 0
    for number in range(10**6):
        total += number
    steps = int(0.02 * 10**6 / (time.perf_counter() - started))
    programs = [COMPUTING.replace("import time\n", "").format(n=number) for number in range(count // 10)]
    return expect(await run_all(pool, programs, f"[{steps}]"))


async def with_endless(pool: SandboxPool, count: int) -> int:
    programs = distinct(count)
    programs[::50] = [ENDLESS.format(n=number) for number in range(len(programs[::50]))]
    return expect(await run_all(pool, programs, INPUT), endless=len(programs[::50]))


LOADS: dict[str, Measure] = {
    "trivial": trivial,
    "trivial, two runs that must agree": twice,
    "ten inputs of one program per call": ten_inputs,
    "20 ms of computing": computing,
    "trivial, 2 % endless, 1 s limit": with_endless,
}


async def measured(name: str, measure: Measure, workers: int, count: int) -> Measured:
    """One load on a fresh pool, after a warm-up."""
    async with SandboxPool(workers=workers, wall_seconds=5.0, cpu_seconds=1.0, label=LABEL) as pool:
        await run_all(pool, [f"def f(x): return {number}" for number in range(50)], INPUT, times=2)
        pool.meter.forget_latencies()
        started, own, theirs = time.perf_counter(), time.process_time(), sandbox_cpu_seconds()
        executions = await measure(pool, count)
        seconds, own = time.perf_counter() - started, time.process_time() - own
        latency, cpu = pool.meter.latency_ms(50, 99), own + sandbox_cpu_seconds() - theirs
        each = 1e6 / executions
        return Measured(name, workers, executions / seconds, latency[50], latency[99], own * each, cpu * each)


def sandbox_cpu_seconds() -> float:
    """CPU time of the sandbox's processes and of every program that they waited for."""
    fields = [_text(path / "stat").rpartition(")")[2].split() for path in sandboxed_processes()]
    return sum(sum(map(int, each[11:15])) for each in fields) / os.sysconf("SC_CLK_TCK")


def sandboxed_processes() -> list[Path]:
    return [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if LABEL in _text(path)]


# ---------------------------------------------------------------- soak


async def soaked(count: int, workers: int) -> dict[str, float]:
    """Mixed programs - good, failing, greedy, endless - and what they leave behind."""
    mixture = (
        *TRIVIAL,
        "def f(x):\n    return {n} / 0",
        "def f(x):\n    return [{n}] * 10**10",
        "import os\ndef f(x): {n}",
    )
    programs = [mixture[number % len(mixture)].format(n=number) for number in range(count)]
    programs[::1000] = [ENDLESS.format(n=number) for number in range(len(programs[::1000]))]
    async with SandboxPool(workers=workers, wall_seconds=2.0, cache_mb=1, label=LABEL) as pool:
        await run_all(pool, programs[: count // 10], INPUT)
        before = left_over()
        started = time.perf_counter()
        await run_all(pool, programs[count // 10 :], INPUT)
        seconds = time.perf_counter() - started
        after = left_over()
        restarts = pool.restarts
    return {
        "executions": count,
        "seconds": seconds,
        "restarts": restarts,
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "processes_at_the_end": left_over()["processes"],
    }


def left_over() -> dict[str, float]:
    """Processes of the sandbox, descriptors of this process, memory of both."""
    mine = sandboxed_processes()
    sandboxed = sum(_resident_pages(path) for path in mine)
    return {
        "processes": len(mine),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "sandbox_resident_mb": sandboxed * resource.getpagesize() / 2**20,
        "own_resident_mb": _resident_pages(Path("/proc/self")) * resource.getpagesize() / 2**20,
    }


def _resident_pages(process: Path) -> int:
    numbers = _text(process / "statm").split()
    return int(numbers[1]) if numbers else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def show(floors: dict[str, dict[str, float]], rows: list[Measured], soak: dict[str, float]) -> None:
    """Medians of the repeats, beside the floor of forking."""
    beside = [floors[name]["executions_per_second"] for name in list(FLOORS)[:4]]  # not the one without isolation
    columns = (
        "load",
        "workers",
        "runs/s",
        "x fork",
        "x -c",
        "x bare",
        "x JSON",
        "p50 ms",
        "p99 ms",
        "CPU us",
        "parent us",
    )
    table = Table(*columns, title="sandbox, beside an empty fork and fresh interpreters")
    for name, floor in floors.items():
        rate, cpu = floor["executions_per_second"], floor["cpu_microseconds"]
        table.add_row(name, "", f"{rate:,.0f}", *_ratios(rate, beside), "", "", f"{cpu:,.0f}", "", style="dim")
    fields = ("executions_per_second", "p50_ms", "p99_ms", "cpu_microseconds", "parent_microseconds")
    for name, workers in dict.fromkeys((row.load, row.workers) for row in rows):
        same = [row for row in rows if (row.load, row.workers) == (name, workers)]
        rate, p50, p99, cpu, parent = (statistics.median(getattr(row, field) for row in same) for field in fields)
        times = (f"{p50:.2f}", f"{p99:.2f}", f"{cpu:,.0f}", f"{parent:,.0f}")
        table.add_row(name, str(workers), f"{rate:,.0f}", *_ratios(rate, beside), *times)
    Console(width=120).print(table)
    Console().print(soak)


def _ratios(rate: float, beside: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{rate / other:.2f}" for other in beside)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000, help="programs of each load [1000]")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="measured from 1 to this many [cores]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--soak", type=int, default=10_000, help="mixed programs at the end [10000]")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser


if __name__ == "__main__":
    main()
