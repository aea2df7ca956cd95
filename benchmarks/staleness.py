"""How stale may it get? Lag bounds, with and without importance correction, over seeds: throughput against accuracy.

Each cell is one run of the starter. The arms:

corrected    the default objective, decoupled PPO with truncated importance weights
uncorrected  `--learner.objective none`: plain REINFORCE on stale data, nothing is clipped or weighed
dropping     corrected, but `--flow.late drop`: the learner does not wait for stragglers, what is too old is thrown
             away; the table then shows how much, and how that differs from what is trained (task, length, reward)

Accuracy is greedy, on held-out tasks, read off the curve of evaluations at equal wall time and at equal trained tokens:
where the first of all runs ended. Intervals are 95 % over seeds. Lag is that of a sample's oldest token; its p99 is an
upper bound, since it counts from admission (the ledger). KL is k3, behaviour against learner, nats per token.

A finished cell is in the output file at once; the same command goes on where it was stopped. `--most 4` ends after four
cells; other lags, arms or seeds add to the same file.

    python benchmarks/staleness.py --output benchmarks/results/staleness.json
    python benchmarks/staleness.py --lags 1 4 --arms dropping --output benchmarks/results/staleness.json
"""

import argparse
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from intervals import Candidate, interval, percentile, recommended, value_at
from rich.console import Console
from rich.table import Table
from whole_runs import read_lines, run, save_figure, write_json

ARMS: Final[dict[str, list[str]]] = {
    "corrected": [],
    "uncorrected": ["--learner.objective", "none", "--learner.allow-uncorrected", "true"],
    "dropping": ["--flow.late", "drop"],
}
FIRST_STEPS: Final = 3
"""Not in rates: the windows of an asynchronous run fill up before the first step."""

Cell = dict[str, Any]


def main() -> None:
    """Run the cells that are missing, seed by seed, so that a part of them is a fair table already."""
    arguments = _parser().parse_args()
    cells = finished(arguments.output, arguments.steps)
    wanted = [(arm, lag, seed) for seed in arguments.seeds for lag in arguments.lags for arm in arguments.arms]
    known = {(cell["arm"], cell["lag"], cell["seed"]) for cell in cells}
    missing = [key for key in wanted if key not in known]
    for number, (arm, lag, seed) in enumerate(missing[: arguments.most], start=1):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            run(folder, *options(arm, lag, seed, arguments), seconds_most=arguments.cell_seconds)
            cells.append({"arm": arm, "lag": lag, "seed": seed, "steps": arguments.steps, **measured(folder)})
        write_json(arguments.output, "staleness", cells)
        progress = f"{number} of {len(missing)}: {arm}, max_lag {lag}, seed {seed}"
        print(f"{progress}: {time.monotonic() - began:.0f} s, {cells[-1]['curve'][-1][2]:.3f}", file=sys.stderr)
    if cells:
        rows = summary(cells)
        sentence = recommendation(rows)
        show(rows, sentence)
        write_json(arguments.output, "staleness", cells, summary=rows, recommendation=sentence)
        if arguments.output is not None:
            draw(rows, cells, arguments.output.with_suffix(".png"))


def options(arm: str, lag: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """The command line of a cell's run."""
    common = ["--max-lag", lag, "--seed", str(seed), "--steps", str(arguments.steps)]
    evaluation = ["--evaluation.every-steps", str(arguments.every), "--evaluation.proposals", "0"]
    return [*common, *evaluation, "--checkpoint.every-steps", "0", *ARMS[arm]]


def finished(path: Path | None, steps: int) -> list[Cell]:
    """The cells of an earlier call, if they are of runs of this length."""
    if path is None or not path.exists():
        return []
    cells: list[Cell] = json.loads(path.read_text(encoding="utf-8"))["results"]
    if any(cell["steps"] != steps for cell in cells):
        raise SystemExit(f"{path} holds runs of other lengths. Use their --steps, or another --output.")
    return cells


def measured(folder: Path) -> Cell:
    """What one run says about its cell."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["step"] > 0]
    tokens = 0
    curve = []
    for line in lines:
        tokens += line["tokens"]["trained"]
        if "eval" in line:
            curve.append((line["wall_seconds"], tokens, line["eval"]["mean"]))
    steady = steps[FIRST_STEPS:]
    seconds = steady[-1]["wall_seconds"] - steps[FIRST_STEPS - 1]["wall_seconds"]
    lags = lags_since_admission(folder / "journal.sqlite")
    return {
        "curve": curve,
        "trained_tokens_per_second": sum(line["tokens"]["trained"] for line in steady) / seconds,
        "busy_learner": statistics.fmean(line["busy"]["learner"] for line in steady),
        "lag_mean": statistics.fmean(line["lag"]["mean"] for line in steady),
        "lag_max": max(line["lag"]["max"] for line in steps),
        "lag_since_admission": lags,
        "lag_p99": min(percentile(lags, 0.99), max(line["lag"]["max"] for line in steps)),
        "ess": statistics.fmean(line["ess"] for line in steady),
        "clip_fraction": statistics.fmean(line["clip_fraction"] for line in steady),
        "kl": statistics.fmean(line["kl"]["k3"] for line in steady),
        **dropping(steps),
    }


def lags_since_admission(journal: Path) -> dict[int, int]:
    """From the ledger: how many trained samples were admitted so many versions before their batch."""
    query = "SELECT step - 1 - version, count(*) FROM samples WHERE stage IN ('trained', 'admitted') GROUP BY 1"
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
        return {int(lag): int(count) for lag, count in connection.execute(query)}


def dropping(steps: Sequence[Mapping[str, Any]]) -> Cell:
    """Which share was dropped as too old, and how it differs from what was trained; empty where nothing was."""
    trained, dropped = (sum(line["samples"][name] for line in steps) for name in ("trained", "dropped"))
    result: Cell = {"dropped_share": dropped / (trained + dropped)}
    if not dropped:
        return result
    tokens = {name: sum(line["tokens"][name] for line in steps) for name in ("trained", "dropped")}
    by_cell = Counter[str]()
    reward, trained_by_cell, trained_reward = 0.0, Counter[str](), 0.0
    for line in steps:
        counts = dict(line.get("dropped", {}))
        reward += counts.pop("reward_sum", 0.0)
        by_cell.update({name: int(count) for name, count in counts.items()})
        for name, of_cell in line["cells"].items():
            trained_by_cell[name] += of_cell["n"]
            trained_reward += of_cell["n"] * line["reward"][name]
    return result | {
        "length_dropped_over_trained": (tokens["dropped"] / dropped) / (tokens["trained"] / trained),
        "reward_dropped_minus_trained": reward / dropped - trained_reward / trained,
        "dropped_share_by_cell": {
            name: by_cell[name] / (by_cell[name] + trained_by_cell[name]) for name in sorted(trained_by_cell)
        },
    }


def summary(cells: Sequence[Cell]) -> list[Cell]:
    """One row per arm and bound: intervals over seeds as (mean, half)."""
    horizon_seconds = min(cell["curve"][-1][0] for cell in cells)
    horizon_tokens = min(cell["curve"][-1][1] for cell in cells)
    for cell in cells:
        points = cell["curve"]
        cell["useful_tokens_per_second"] = cell["trained_tokens_per_second"] * cell["ess"]
        cell["accuracy_at_equal_seconds"] = value_at(horizon_seconds, [(point[0], point[2]) for point in points])
        cell["accuracy_at_equal_tokens"] = value_at(horizon_tokens, [(point[1], point[2]) for point in points])
    keys = sorted({(cell["arm"], cell["lag"]) for cell in cells}, key=lambda key: (key[0], _order(key[1])))
    rows = []
    for arm, lag in keys:
        same = sorted(
            (cell for cell in cells if (cell["arm"], cell["lag"]) == (arm, lag)), key=lambda cell: cell["seed"]
        )
        everything = dict.fromkeys(name for cell in same for name, value in cell.items() if _is_number(value))
        names = [name for name in everything if name not in ("seed", "steps")]
        row: Cell = {"arm": arm, "lag": lag, "seeds": [cell["seed"] for cell in same]}
        row["accuracies"] = [cell["accuracy_at_equal_seconds"] for cell in same]
        for name in names:
            values = [float(cell[name]) for cell in same if name in cell]
            row[name] = [interval(values).mean, interval(values).half if len(values) > 1 else None]
        rows.append(row)
    return rows


def recommendation(rows: Sequence[Cell]) -> str:
    """One sentence: the smallest bound that is nearly the fastest and not provably worse, among the corrected arm."""
    corrected = [row for row in rows if row["arm"] == "corrected" and row["lag"] != "auto"]
    seeds = set.intersection(*(set(row["seeds"]) for row in corrected)) if corrected else set()
    candidates = [
        Candidate(
            f"max_lag {row['lag']}",
            row["useful_tokens_per_second"][0],
            [value for seed, value in zip(row["seeds"], row["accuracies"], strict=True) if seed in seeds],
        )
        for row in corrected
    ]
    if len(seeds) < 2 or len(candidates) < 2:
        return "No recommendation: the corrected arm needs at least two bounds with two seeds in common."
    chosen, reason = recommended(candidates)
    return f"Use {chosen.name}: {reason}."


def show(rows: Sequence[Cell], sentence: str) -> None:
    """The table and the recommendation."""
    table = Table("arm", "max_lag", "seeds", "tokens/s", "x ESS", "lag mean, p99, max", "ESS", "clipped", "KL",
                  "dropped", "accuracy, equal s", "equal tokens", title="means ± 95 % intervals")  # fmt: skip
    for row in rows:
        lags = f"{row['lag_mean'][0]:.2f}, {row['lag_p99'][0]:.1f}, {row['lag_max'][0]:.1f}"
        table.add_row(
            row["arm"],
            row["lag"],
            str(len(row["seeds"])),
            *(_text(row[name], 0) for name in ("trained_tokens_per_second", "useful_tokens_per_second")),
            lags,
            *(f"{row[name][0]:.3g}" for name in ("ess", "clip_fraction", "kl")),
            f"{row['dropped_share'][0]:.1%}",
            *(_text(row[f"accuracy_at_equal_{of}"], 3) for of in ("seconds", "tokens")),
        )
    console = Console(width=160)
    console.print(table)
    for row in rows:
        if "length_dropped_over_trained" in row:
            length, reward = row["length_dropped_over_trained"][0], row["reward_dropped_minus_trained"][0]
            what = f"{row['arm']}, max_lag {row['lag']}: what was dropped is {length:.2f} times as long as"
            console.print(f"{what} what was trained, its reward differs by {reward:+.3f}")
    console.print(sentence)


def draw(rows: Sequence[Cell], cells: Sequence[Cell], path: Path) -> None:
    """Four panels: accuracy and throughput by bound, what staleness does to the weights, and learning curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = dict(zip(("accuracy_at_equal_seconds", "useful_tokens_per_second", "ess"), figure.subplots(2, 2).flat,
                      strict=False))  # fmt: skip
    labels = sorted({row["lag"] for row in rows}, key=_order)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        same = [row for row in rows if row["arm"] == arm]
        for name, axes in panels.items():
            places = [labels.index(row["lag"]) for row in same]
            halves = [row[name][1] or 0.0 for row in same]
            axes.errorbar(places, [row[name][0] for row in same], halves, marker="o", capsize=3, label=arm)
            axes.set(xlabel="max_lag", ylabel=name.replace("_", " "), xticks=range(len(labels)), xticklabels=labels)
            axes.legend()
    axes = figure.axes[3]
    for number, row in enumerate(row for row in rows if row["arm"] == "corrected"):
        for cell in cells:
            if (cell["arm"], cell["lag"]) == ("corrected", row["lag"]):
                seconds, _, accuracy = zip(*cell["curve"], strict=True)
                label = f"max_lag {row['lag']}" if cell["seed"] == row["seeds"][0] else None
                axes.plot(seconds, accuracy, color=f"C{number}", alpha=0.6, label=label)
    axes.set(xlabel="seconds of training", ylabel="held-out accuracy, corrected")
    if axes.lines:
        axes.legend()
    save_figure(figure, path)


def _text(pair: Sequence[float | None], digits: int) -> str:
    mean, half = pair
    return f"{mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if half is not None else "")


def _is_number(value: object) -> bool:
    return isinstance(value, float | int)


def _order(lag: str) -> tuple[bool, int]:
    return (lag == "auto", 0 if lag == "auto" else int(lag))


def _lag(text: str) -> str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no lag bound. Give a number of steps, or auto.")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lags", type=_lag, nargs="+", default=["0", "1", "2", "4", "8"], help="[0 1 2 4 8], or auto")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["corrected", "uncorrected"],
                        help="[corrected uncorrected]")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="[1 2 3]")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each run [50]")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations [10]")
    parser.add_argument("--most", type=int, help="end after so many new cells [all]")
    parser.add_argument("--cell-seconds", type=float, default=600.0, help="a run that takes longer has failed [600]")
    parser.add_argument("--output", type=Path, help="JSON of all cells so far, and a figure of the same name")
    return parser


if __name__ == "__main__":
    main()
