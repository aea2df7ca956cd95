"""How well does `python -m azr_async plan` predict? A run calibrates it; a run of other settings right after checks it.

Every run is a whole one, on this machine. Without GPUs its programs share the cores, which the planner models as such.
All calibrating runs have the same settings: how far their rates lie apart tells how steady the machine was. A held-back
run has as many samples as the calibrating one: a model that learns changes the work, for as it repeats itself, more and
more of its answers need no sandbox.

    python benchmarks/planner.py --output benchmarks/results/planner.json
    python benchmarks/planner.py --runs DIR --only slots,lag-0      # keep the runs; make or check just these
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from whole_runs import read_lines, run, write_json

from azr_async.algorithm.simulation import Machine, Workload
from azr_async.programs.plan import predicted, stretch_of
from azr_async.programs.trace import FIRST_STEPS, read_trace

QUIET: Final = ("--evaluation.suite", "none")
STEPS: Final = 30
CALIBRATION: Final = ("--max-lag", "2", "--evaluation.every-steps", "12", "--steps", str(STEPS))
HELD_BACK: Final[dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]]] = {
    "no-evaluation": (("--max-lag", "2", *QUIET), {}, {}),
    "lag-0": (("--max-lag", "0", *QUIET), {}, {"max_lag": 0}),
    "lag-1": (("--max-lag", "1", *QUIET), {}, {"max_lag": 1}),
    "lag-4": (("--max-lag", "4", *QUIET), {}, {"max_lag": 4}),
    "slots-64": (("--engine.slots", "64", *QUIET), {"slots": 64}, {}),
    "half-batch": (
        ("--flow.propose-samples", "4", "--flow.solve-samples", "48", "--steps", str(2 * STEPS), *QUIET),
        {},
        {"propose_samples": 4, "solve_samples": 48},
    ),
    "double-batch": (
        ("--flow.propose-samples", "16", "--flow.solve-samples", "192", "--steps", str(STEPS // 2), *QUIET),
        {},
        {"propose_samples": 16, "solve_samples": 192},
    ),
    "two-engines": (("--inference-workers", "2", *QUIET), {"engines": 2}, {}),
    "one-sandbox-worker": (("--sandbox.workers", "1", *QUIET), {"sandbox_workers": 1}, {}),
    "evaluation-every-5": (("--evaluation.every-steps", "5"), {}, {"evaluated_every": 5}),
}
"""Options of the run; what is different in the models of the machine and of the work."""


def main() -> None:
    """Run, predict, compare."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.runs or Path(scratch)
        names = arguments.only.split(",") if arguments.only else list(HELD_BACK)
        for name in names:
            _lines(folder / f"{name}-calibration", *CALIBRATION)
            _lines(folder / name, "--steps", str(STEPS), *HELD_BACK[name][0])
        rows = [compared(folder, name, arguments.cores) for name in names]
    show(rows)
    write_json(arguments.output, "planner", rows)


def compared(folder: Path, name: str, cores: int) -> dict[str, Any]:
    """Predicted by the calibrating run before it, and measured."""
    trace = read_trace(folder / f"{name}-calibration", cores=cores)
    _, machine_changes, work_changes = HELD_BACK[name]
    machine: Machine = replace(trace.machine, **machine_changes)
    work: Workload = replace(trace.workload, **({"evaluated_every": 0} | work_changes))
    lines = _lines(folder / name)
    steps = max(40, len(lines))
    plan = predicted(machine, work, steps=steps, stretch=stretch_of(trace, steps=steps))
    steady = [line for line in lines if line["step"] > FIRST_STEPS]
    first = next(line for line in lines if line["step"] == FIRST_STEPS)
    seconds = steady[-1]["wall_seconds"] - first["wall_seconds"]
    measured = {
        "steps_per_second": len(steady) / seconds,
        "lag_mean": statistics.fmean(line["lag"]["mean"] for line in steady),
        "busy_inference": statistics.fmean(line["busy"]["inference"] for line in steady),
        "busy_learner": statistics.fmean(line["busy"]["learner"] for line in steady),
    }
    result: dict[str, Any] = {"name": name, "calibration_steps_per_second": trace.steps_per_second}
    for key, value in measured.items():
        result |= {key: value, f"predicted_{key}": getattr(plan, key)}
    return result | {"error": plan.steps_per_second / measured["steps_per_second"] - 1.0}


def show(rows: list[dict[str, Any]]) -> None:
    """Measured and predicted, side by side."""
    table = Table(
        "held-back run",
        "calibration",
        "steps/s",
        "predicted",
        "error",
        "lag",
        "predicted",
        "busy inference",
        "predicted",
    )
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['calibration_steps_per_second']:.3g}",
            f"{row['steps_per_second']:.3g}",
            f"{row['predicted_steps_per_second']:.3g}",
            f"{row['error']:+.1%}",
            f"{row['lag_mean']:.2f}",
            f"{row['predicted_lag_mean']:.2f}",
            f"{row['busy_inference']:.0%}",
            f"{row['predicted_busy_inference']:.0%}",
        )
    errors = sorted(abs(row["error"]) for row in rows)
    console = Console(width=110)
    console.print(table)
    console.print(f"error of the rate: median {statistics.median(errors):.1%}, largest {errors[-1]:.1%}")


def _lines(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Of a run that is made unless it is there."""
    if (folder / "metrics.jsonl").is_file():
        return read_lines(folder / "metrics.jsonl")
    return run(folder, *options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"names of held-back runs, of {', '.join(HELD_BACK)}")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; those that it has are not made again")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="that the programs of a run share")
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
