"""Whole runs that are interrupted and go on: exactly where they were, on more processes too."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--flow.propose-samples", "2", "--flow.solve-samples", "8", "--solve.attempts", "4"),
    *("--solve.trained-attempts", "4", "--library.seed-tasks", "4", "--evaluation.suite", "none"),
    *("--checkpoint.every-steps", "3"),
)
SAMPLES_PER_STEP = 3 * (2 + 8)
ONE_BY_ONE = ("--max-lag", "0", "--engine.slots", "1")
"""What an engine computes side by side may differ in the last bit by what it computes beside it."""
RUN_SECONDS = 240.0


def run(*options: str) -> None:
    done = subprocess.run(
        [sys.executable, "run.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def kill_all_at(step: int, *options: str) -> None:
    """Start a run and kill every process of it at once, the moment the step is told."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:  # ends with the process, which pytest-timeout bounds
            if line.startswith(f"step {step}/"):
                break
    finally:
        programs = psutil.Process(process.pid).children(recursive=True)
        for pid in (process.pid, *(program.pid for program in programs)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        psutil.wait_procs(programs, timeout=10)


def rows(run_dir: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(run_dir / "journal.sqlite")) as journal:
        return journal.execute(query).fetchall()


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed, spread = tmp_path / "whole", tmp_path / "resumed", tmp_path / "spread"
    run("--output", str(whole), *SMALL, *ONE_BY_ONE, "--steps", "6")
    middle = str(whole / "checkpoints" / "step-000003")
    run("--resume", middle, "--output", str(resumed))
    run("--resume", middle, "--output", str(spread), "--inference-workers", "2", "--learner-ranks", "2")
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (folder / "checkpoints" / "step-000006" / file for folder in (whole, resumed))
        assert one.read_bytes() == other.read_bytes()
    ledger = "SELECT * FROM samples WHERE step <= 6 ORDER BY 1, 2, 3"
    assert rows(whole, ledger) == rows(resumed, ledger) == rows(spread, ledger)
    before, after = weights(whole, 3), weights(whole, 6)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, tensor in weights(spread, 6).items():  # two ranks add up in another order
        torch.testing.assert_close(tensor, after[name], rtol=0.0, atol=1e-6)


def test_a_run_that_was_killed_loses_no_task_and_trains_no_sample_twice(tmp_path: Path) -> None:
    output = tmp_path / "run"
    kill_all_at(5, "--output", str(output), *SMALL, "--max-lag", "2", "--steps", "8")
    found = rows(output, "SELECT id, program FROM tasks")
    run("--resume", str(output), "--inference-workers", "2")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == list(range(1, 9))
    assert all(line["lag"]["max"] <= 2 for line in lines)
    trained = rows(output, "SELECT step, count(*) FROM samples WHERE stage = 'trained' GROUP BY step ORDER BY step")
    assert trained == [(step, SAMPLES_PER_STEP) for step in range(1, 9)]
    assert set(found) <= set(rows(output, "SELECT id, program FROM tasks"))
