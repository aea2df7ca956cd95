"""How near does the whole pipeline come to its slowest stage, and what does asynchrony buy?

real       the starter on this machine. Inference, sandbox and learner alone, over a run's own tasks; then whole runs,
           synchronous (`--max-lag 0`) and asynchronous, interleaved. Where three busy processes share fewer cores, no
           order of work reaches the slowest stage alone: the limit is then the CPU, cores / (CPU time of a trained
           token over all processes), and the table shows the ratio to both.
simulated  splits that this machine does not have (1+1 with balanced sides, 4+4, 64+32), with engines and a learner that
           sleep instead of computing, around the real self-play program; the limit is the speed of either side.

Efficiency = asynchronous rate / limit. Rates are trained tokens (of completions) per second of wall time, after the
first steps. Where time is lost: the learner waits for a batch, or pushes; engines pause for weights, or have no work.

    python benchmarks/throughput.py --output benchmarks/results/throughput.json
    python benchmarks/throughput.py --parts simulated --shapes 1+1 --repeats 1
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table
from scripted_peers import SPAWN
from simulated_shapes import SHAPES, simulated
from stages_alone import stages_alone
from whole_runs import run, save_figure, write_json

from azr_async.config import Config

FIRST_STEPS: Final = 5
"""Left out: the windows of an asynchronous run fill up before the first step."""
PROGRAMS: Final = ("inference", "selfplay", "learner")
Row = dict[str, Any]
CpuSeconds = Mapping[str, float]


def main() -> None:
    """Measure, repeats interleaved, and print the ratios."""
    arguments = _parser().parse_args()
    rows: list[Row] = []
    for repeat in range(1, arguments.repeats + 1):
        if "real" in arguments.parts:
            rows += real(repeat, arguments)
            print(f"{repeat} of {arguments.repeats}: {_told(rows[-3:])}", file=sys.stderr)
        for name in arguments.shapes if "simulated" in arguments.parts else ():
            for lag in (0, arguments.max_lag):
                figures = simulated(SHAPES[name], lag, arguments.seconds)
                limit = SHAPES[name].tokens_per_second
                rows.append({"shape": f"{name} simulated", "max_lag": lag, "repeat": repeat, "limit": limit, **figures})
            print(f"{repeat} of {arguments.repeats}: {_told(rows[-2:])}", file=sys.stderr)
    ratios = {name: ratios_of([row for row in rows if row["shape"] == name]) for name in _shapes(rows)}
    show(rows, ratios)
    main_shape = "this machine" if "this machine" in ratios else next(iter(ratios))
    headline = {name: ratios[main_shape][name] for name in ("pipeline_efficiency", "async_over_sync")}
    write_json(arguments.output, "throughput", rows, load=os.getloadavg(), **headline, ratios=ratios)
    if arguments.output is not None:
        draw(rows, arguments.output.with_suffix(".png"))


def real(repeat: int, arguments: argparse.Namespace) -> list[Row]:
    """One repeat on this machine: stages alone, then synchronous and asynchronous."""
    common = {"shape": "this machine", "repeat": repeat}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for lag in (0, arguments.max_lag):
            folder, watched = Path(scratch) / f"lag-{lag}", list[tuple[int, CpuSeconds]]()
            options = ("--max-lag", str(lag), "--steps", str(arguments.steps), "--seed", str(repeat))
            lines = run(folder, *options, "--evaluation.every-steps", "0", watch=cpu_reader(folder, watched))
            rows.append({**common, "max_lag": lag, **measured(lines), **cpu_of_a_token(lines, watched)})
        with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
            journal = Path(scratch) / f"lag-{arguments.max_lag}" / "journal.sqlite"
            alone = pool.submit(stages_alone, journal, Config().model_dump_json()).result(300.0)
    for row in rows:
        row["limit"] = min(alone.values())
        row["limit_of_shared_cpu"] = 1e6 * (os.cpu_count() or 1) / sum(row["cpu_microseconds"].values())
    return [{**common, "max_lag": None, "alone": alone}, *rows]


def measured(lines: Sequence[Row]) -> Row:
    """Rates after the first steps, and where the time went."""
    first, steady = lines[FIRST_STEPS - 1], lines[FIRST_STEPS:-1]
    seconds = steady[-1]["wall_seconds"] - first["wall_seconds"]
    trained, generated = (sum(line["tokens"][name] for line in steady) for name in ("trained", "generated"))
    training = sum(line["train_seconds"] for line in steady) / seconds
    pushing = sum(line["weights"]["push_seconds"] for line in steady) / seconds
    return {
        "trained_tokens_per_second": trained / seconds,
        "generated_tokens_per_second": generated / seconds,
        "steps": float(len(steady)),
        "learner_training": training,
        "learner_pushing": pushing,
        "learner_waiting": max(0.0, 1.0 - training - pushing),
        "inference_computing": statistics.fmean(line["busy"]["inference"] for line in steady),
        "inference_paused": sum(line["weights"]["pause_seconds"] for line in steady) / seconds,
        "sandbox_busy": statistics.fmean(line["busy"]["sandbox"] for line in steady),
        "lag_mean": statistics.fmean(line["lag"]["mean"] for line in steady),
        "lag_max": max(line["lag"]["max"] for line in steady),
    }


def cpu_reader(folder: Path, readings: list[tuple[int, CpuSeconds]]) -> Callable[[psutil.Process], None]:
    """Notes how many steps are done, and the CPU time that each program of the run has had, sandboxes apart."""

    path = folder / "metrics.jsonl"

    def read(launcher: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):  # the run has not begun, or ends now
            steps = path.read_bytes().count(b"\n")
            seconds = defaultdict(float, launcher=sum(launcher.cpu_times()[:2]))
            for program in launcher.children():
                name = next((name for name in PROGRAMS if any(name in word for word in program.cmdline())), "other")
                seconds[name] += sum(program.cpu_times()[:2])
                seconds["sandbox"] += sum(_cpu_with_reaped(below) for below in program.children(recursive=True))
            readings.append((steps, seconds))

    return read


def _cpu_with_reaped(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.NoSuchProcess:  # it has just ended: its time is its parent's now
        return 0.0


def cpu_of_a_token(lines: Sequence[Row], readings: Sequence[tuple[int, CpuSeconds]]) -> Row:
    """CPU time of each program for one trained token, between the first and the last reading of the steady steps."""
    steady = [reading for reading in readings if FIRST_STEPS <= reading[0] < len(lines)]
    (first, before), (last, after) = steady[0], steady[-1]
    tokens = sum(line["tokens"]["trained"] for line in lines[first:last])
    return {"cpu_microseconds": {name: 1e6 * (after[name] - before[name]) / tokens for name in after}}


def ratios_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians over the repeats, with the smallest and the largest."""
    ratios: dict[str, list[float]] = {"pipeline_efficiency": [], "async_over_sync": []}
    for repeat in sorted({row["repeat"] for row in rows}):
        mine = sorted((row for row in rows if (row["repeat"], row["max_lag"]) != (repeat, None)
                       and row["repeat"] == repeat), key=lambda row: row["max_lag"])  # fmt: skip
        rate = mine[-1]["trained_tokens_per_second"]
        ratios["pipeline_efficiency"].append(rate / mine[-1]["limit"])
        ratios["async_over_sync"].append(rate / mine[0]["trained_tokens_per_second"])
        if "limit_of_shared_cpu" in mine[-1]:
            ratios.setdefault("of_shared_cpu_limit", []).append(rate / mine[-1]["limit_of_shared_cpu"])
    result: dict[str, Any] = {name: statistics.median(values) for name, values in ratios.items()}
    return result | {f"{name}_spread": [min(values), max(values)] for name, values in ratios.items()}


def show(rows: Sequence[Row], ratios: dict[str, Any]) -> None:
    """A table of the stages alone, one of the pipelines, and the ratios in words."""
    console = Console(width=140)
    alone = [row["alone"] for row in rows if "alone" in row]
    if alone:
        table = Table("stage alone, this machine", "tokens/s, median", "smallest - largest")
        for name in alone[0]:
            rates = [row[name] for row in alone]
            table.add_row(name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} - {max(rates):,.0f}")
        console.print(table)
    shares = ("learner_training", "learner_pushing", "learner_waiting", "inference_computing", "sandbox_busy")
    table = Table("shape", "max_lag", "trained tokens/s", "smallest - largest", "limit",
                  *(name.replace("_", " ") for name in shares), "lag mean, max")  # fmt: skip
    for same in _arms(rows):
        rates = [row["trained_tokens_per_second"] for row in same]
        spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
        middles = {name: statistics.median(row[name] for row in same) for name in ("limit", "lag_mean", *shares)}
        table.add_row(same[0]["shape"], str(same[0]["max_lag"]), f"{statistics.median(rates):,.0f}", spread,
                      f"{middles['limit']:,.0f}", *(f"{middles[name]:.0%}" for name in shares),
                      f"{middles['lag_mean']:.2f}, {max(row['lag_max'] for row in same):.0f}")  # fmt: skip
    console.print(table)
    for same in _arms(rows):
        if "cpu_microseconds" in same[0]:
            names = same[0]["cpu_microseconds"]
            costs = {name: statistics.median(row["cpu_microseconds"][name] for row in same) for name in names}
            told = ", ".join(f"{name} {cost:.0f}" for name, cost in costs.items())
            limit = statistics.median(row["limit_of_shared_cpu"] for row in same)
            console.print(f"max_lag {same[0]['max_lag']}: CPU us per trained token: {told}; "
                          f"so {os.cpu_count()} cores make at most {limit:,.0f} tokens/s")  # fmt: skip
    for name, of_shape in ratios.items():
        words = (
            f"{of_shape['pipeline_efficiency']:.2f} of its limit, {of_shape['async_over_sync']:.2f} times synchronous"
        )
        shared = (
            f", {of_shape['of_shared_cpu_limit']:.2f} of the shared CPU" if "of_shared_cpu_limit" in of_shape else ""
        )
        console.print(f"{name}: asynchronous {words}{shared}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """How the learner spends its time, and the rate beside its limit, for every shape."""
    from matplotlib.figure import Figure

    arms = list(_arms(rows))
    names = [f"{same[0]['shape']}\nmax_lag {same[0]['max_lag']}" for same in arms]
    figure = Figure(figsize=(4 + 1.6 * len(arms), 6), layout="constrained")
    rate_axes, time_axes = figure.subplots(2, 1, sharex=True)
    below = [0.0] * len(arms)
    for part in ("training", "pushing", "waiting"):
        shares = [statistics.median(row[f"learner_{part}"] for row in same) for same in arms]
        time_axes.bar(names, shares, bottom=below, label=part)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    time_axes.set_ylabel("the learner's time")
    time_axes.legend()
    ratios = [[row["trained_tokens_per_second"] / row["limit"] for row in same] for same in arms]
    middles = [statistics.median(values) for values in ratios]
    ends = [[middle - min(values) for middle, values in zip(middles, ratios, strict=True)],
            [max(values) - middle for middle, values in zip(middles, ratios, strict=True)]]  # fmt: skip
    rate_axes.bar(names, middles, yerr=ends, capsize=4)
    rate_axes.axhline(1.0, color="black", linewidth=0.8)
    rate_axes.set_ylabel("rate / limit")
    save_figure(figure, path)


def _arms(rows: Sequence[Row]) -> list[list[Row]]:
    keys = dict.fromkeys((row["shape"], row["max_lag"]) for row in rows if row["max_lag"] is not None)
    return [[row for row in rows if (row["shape"], row["max_lag"]) == key] for key in keys]


def _shapes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def _told(rows: Sequence[Row]) -> str:
    arms = [f"max_lag {row['max_lag']}: {row['trained_tokens_per_second']:,.0f}" for row in rows if "steps" in row]
    return f"{rows[-1]['shape']}, tokens/s: {', '.join(arms)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("real", "simulated"), default=["real", "simulated"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="simulated [all]")
    parser.add_argument("--max-lag", type=int, default=2, help="of the asynchronous arm [2]")
    parser.add_argument("--steps", type=int, default=40, help="of each real run [40]")
    parser.add_argument("--seconds", type=float, default=20.0, help="least time that a simulated run is measured [20]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON of the results, and a figure of the same name")
    return parser


if __name__ == "__main__":
    main()
