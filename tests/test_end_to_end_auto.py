"""A whole run whose staleness bound is searched, and one that goes on with it."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from azr_async.programs.plan import main as plan

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--flow.propose-samples", "2", "--flow.solve-samples", "8", "--solve.attempts", "4"),
    *("--solve.trained-attempts", "4", "--library.seed-tasks", "4", "--checkpoint.every-steps", "100"),
    *("--evaluation.suite", "none", "--max-lag", "auto", "--flow.lag-ceiling", "5", "--flow.lag-decision-steps", "3"),
)
RUN_SECONDS = 240.0


def run(output: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "run.py", *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_bound_is_searched_obeyed_resumed_and_planned_from(tmp_path: Path) -> None:
    first = run(tmp_path / "run", "--output", str(tmp_path / "run"), *SMALL, "--steps", "24")
    lags = [line["lag"] for line in first]
    assert all(lag["max"] <= lag["bound"] <= 5 for lag in lags)
    assert all(1 <= lag["next_bound"] <= 5 for lag in lags)
    decided = [lag for lag in lags if lag["decision"]]
    assert decided
    assert all("useful tokens/s" in lag["decision"] for lag in decided)
    changed = [after for before, after in pairwise(lags) if before["next_bound"] != after["next_bound"]]
    assert changed
    assert all(lag["decision"] for lag in changed)
    assert sum(line["samples"]["dropped"] for line in first) == 0

    again = run(tmp_path / "run", "--resume", str(tmp_path / "run"), "--steps", "27")
    assert [line["step"] for line in again] == list(range(1, 28))
    assert again[24]["lag"]["next_bound"] == lags[-1]["next_bound"]
    assert plan(["--trace", str(tmp_path / "run"), "--max-lag", "0,2", "--steps", "8", "--json"]) == 0
