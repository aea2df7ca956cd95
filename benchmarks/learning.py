"""Does asynchronous self-play make the starter better, and only because of its rewards?

Every seed runs twice: as it is, and with rewards shuffled within each cell (the control, which must not
improve). The same held-out tasks are judged before and after, so the change is tested in pairs: exact
McNemar test on the tasks that changed sides. Prints a table, with the spread over seeds.

    python benchmarks/learning.py --seeds 1 2 3 4 5 --output benchmarks/results/learning.json
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest, t
from whole_runs import read_lines, run, write_json

LEAST_GAIN = 0.10
LARGEST_P = 0.01


def main() -> None:
    """Run all pairs and print the table."""
    arguments = _parser().parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            for shuffled in (False, True):
                folder = Path(scratch) / f"seed-{seed}-{'shuffled' if shuffled else 'rewarded'}"
                control = ["--control.shuffle-rewards", str(shuffled).lower()]
                run(folder, "--seed", str(seed), *control, *arguments.run_options)
                rows.append({"seed": seed, "shuffled": shuffled, **measured(folder)})
                Console().print(f"seed {seed}, {'shuffled' if shuffled else 'rewarded'}: {rows[-1]}")
    show(rows)
    write_json(arguments.output, "learning", rows)
    raise SystemExit(0 if is_shown(rows) else "not shown: a run gained too little, or a control improved")


def is_shown(rows: list[dict[str, Any]]) -> bool:
    """Every run with real rewards gains LEAST_GAIN (p < 0.01), and no control improves (p >= 0.01)."""
    return all(
        row["p"] >= LARGEST_P
        if row["shuffled"]
        else row["p"] < LARGEST_P and row["after"] - row["before"] >= LEAST_GAIN
        for row in rows
    )


def measured(folder: Path) -> dict[str, Any]:
    """Accuracy before and after, the paired test, and what the run was like."""
    evaluations, metrics = read_lines(folder / "evaluations.jsonl"), read_lines(folder / "metrics.jsonl")
    first, last = evaluations[0]["solved"], evaluations[-1]["solved"]
    gained = sum(after > before for before, after in zip(first, last, strict=True))
    lost = sum(after < before for before, after in zip(first, last, strict=True))
    return {
        "tasks": len(first),
        "before": statistics.fmean(first),
        "after": statistics.fmean(last),
        "gained": gained,
        "lost": lost,
        "p": float(binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue) if gained + lost else 1.0,
        "steps": metrics[-1]["step"],
        "training_seconds": metrics[-1]["wall_seconds"],
        "mean_lag": statistics.fmean(line["lag"]["mean"] for line in metrics if line["step"] > 0),
        "max_lag": max(line["lag"]["max"] for line in metrics),
        "lag_bound": metrics[-1]["lag"]["bound"],
        "canary": max(line["weights"]["canary_max_logp_error"] for line in metrics),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table, then mean gain and 95 % interval over seeds of both arms."""
    table = Table("seed", "rewards", "before", "after", "gain", "p (paired)", "seconds", "steps", "lag mean/max/bound")
    for row in rows:
        table.add_row(
            str(row["seed"]),
            "shuffled" if row["shuffled"] else "real",
            f"{row['before']:.3f}",
            f"{row['after']:.3f}",
            f"{100 * (row['after'] - row['before']):+.1f}",
            f"{row['p']:.1e}",
            f"{row['training_seconds']:.0f}",
            str(row["steps"]),
            f"{row['mean_lag']:.2f}/{row['max_lag']}/{row['lag_bound']}",
        )
    Console(width=120).print(table)
    for shuffled in (False, True):
        gains = [100 * (row["after"] - row["before"]) for row in rows if row["shuffled"] == shuffled]
        if len(gains) > 1:
            half = t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
            name = "shuffled rewards" if shuffled else "real rewards"
            Console().print(
                f"{name}: {statistics.fmean(gains):+.1f} points (95 % interval ± {half:.1f}, n = {len(gains)})"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    parser.add_argument("run_options", nargs="*", help="after `--`: options for run.py")
    return parser


if __name__ == "__main__":
    main()
