"""What does asynchrony buy here? Wall time per trained token, synchronous against asynchronous, side by side.

Interleaved repeats of the same run with `--max-lag 0` (every stage waits for the one before) and with a lag
bound; steps are counted after the first, so that seeding and start-up do not blur the rate.

    python benchmarks/async_vs_sync.py --max-lag 2 --repeats 3 --output benchmarks/results/async_vs_sync.json
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from whole_runs import run, write_json

FIRST_STEPS = 5
"""Left out: the windows of an asynchronous run fill up before the first step."""


def main() -> None:
    """Run, interleaved, and print the ratio of the medians."""
    arguments = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(arguments.repeats):
            for max_lag in (0, arguments.max_lag):
                lines = run(
                    Path(scratch) / f"{repeat}-{max_lag}",
                    *("--max-lag", str(max_lag), "--steps", str(arguments.steps), "--seed", str(repeat + 1)),
                    *("--evaluation.every-steps", "0"),
                )
                rows.append({"max_lag": max_lag, **measured(lines)})
                Console().print(rows[-1])
    show(rows, arguments.max_lag)
    write_json(arguments.output, "async_vs_sync", rows)


def measured(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Rates after the first steps, and how busy the stages were."""
    first, steady = lines[FIRST_STEPS - 1], lines[FIRST_STEPS:-1]
    seconds = steady[-1]["wall_seconds"] - first["wall_seconds"]
    trained = sum(line["tokens"]["trained"] for line in steady)
    return {
        "trained_tokens_per_second": trained / seconds,
        "microseconds_per_trained_token": 1e6 * seconds / trained,
        "seconds_per_step": seconds / len(steady),
        "mean_lag": statistics.fmean(line["lag"]["mean"] for line in steady),
        **{
            f"busy_{name}": statistics.fmean(line["busy"][name] for line in steady)
            for name in ("inference", "learner", "sandbox")
        },
    }


def show(rows: list[dict[str, Any]], max_lag: int) -> None:
    """Medians side by side."""
    arms = [[row for row in rows if row["max_lag"] == lag] for lag in (0, max_lag)]
    table = Table("", "synchronous (max_lag 0)", f"asynchronous (max_lag {max_lag})")
    for name in rows[0]:
        if name != "max_lag":
            table.add_row(name.replace("_", " "), *(f"{_median(arm, name):.3g}" for arm in arms))
    Console(width=120).print(table)
    synchronous, asynchronous = (_median(arm, "microseconds_per_trained_token") for arm in arms)
    Console().print(f"a trained token takes {synchronous / asynchronous:.2f} times as long synchronously")


def _median(rows: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(row[name] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-lag", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
