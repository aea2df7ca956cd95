"""Whole runs that are interrupted and go on: exactly where they were, on more processes too."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
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
    done = run_with_files_of(resource.RLIM_INFINITY, *options)
    assert done.returncode == 0, done.stderr


def run_with_files_of(most_bytes: int, *options: str) -> "subprocess.CompletedProcess[str]":
    """To the processes of the run, a disk is full when a file reaches this size."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    return subprocess.run(
        [sys.executable, "run.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
        preexec_fn=limit,
    )


def kill_all_while_writing(step: int, output: Path, *options: str) -> None:
    """Start a run and kill every process of it at once, the moment the checkpoint of this step is being written."""
    root, name = output / "checkpoints", f"step-{step:06d}"
    options = ("--output", str(output), *options)
    process = subprocess.Popen(
        [sys.executable, "run.py", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:  # ends with the process, which pytest-timeout bounds
            if line.startswith(f"step {step - 1}/"):
                break
        while process.poll() is None and not any((root / folder).exists() for folder in (f".{name}.writing", name)):
            pass
    finally:
        programs = psutil.Process(process.pid).children(recursive=True)
        for pid in (process.pid, *(program.pid for program in programs)):
            with suppress(ProcessLookupError):  # programs of the sandbox come and go
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        psutil.wait_procs(programs, timeout=10)


def rows(run_dir: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(run_dir / "journal.sqlite")) as journal:
        return journal.execute(query).fetchall()


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed, spread = all_ = tmp_path / "whole", tmp_path / "resumed", tmp_path / "spread"
    run("--output", str(whole), *SMALL, *ONE_BY_ONE, "--steps", "6")
    middle = str(whole / "checkpoints" / "step-000003")
    run("--resume", middle, "--output", str(resumed))
    run("--resume", middle, "--output", str(spread), "--inference-workers", "2", "--learner-ranks", "2")
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (folder / "checkpoints" / "step-000006" / file for folder in (whole, resumed))
        assert one.read_bytes() == other.read_bytes()
    ledger = "SELECT * FROM samples WHERE step <= 6 ORDER BY 1, 2, 3"
    assert rows(whole, ledger) == rows(resumed, ledger) == rows(spread, ledger)
    schedule = [[(line["step"], line["version"], line["learning_rate"]) for line in lines(folder)] for folder in all_]
    assert schedule[0] == schedule[1] == schedule[2]
    assert [rate for *_, rate in schedule[0]] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 5e-4])
    before, after = weights(whole, 3), weights(whole, 6)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, tensor in weights(spread, 6).items():  # two ranks add up in another order
        torch.testing.assert_close(tensor, after[name], rtol=0.0, atol=1e-6)


def test_a_run_that_was_killed_loses_no_task_and_trains_no_sample_twice(tmp_path: Path) -> None:
    output = tmp_path / "run"
    kill_all_while_writing(6, output, *SMALL, "--max-lag", "2", "--steps", "8")
    found = rows(output, "SELECT id, program FROM tasks")
    run("--resume", str(output), "--inference-workers", "2")
    assert [line["version"] for line in lines(output)] == list(range(1, 9))
    assert all(line["lag"]["max"] <= 2 for line in lines(output))
    trained = rows(output, "SELECT step, count(*) FROM samples WHERE stage = 'trained' GROUP BY step ORDER BY step")
    assert trained == [(step, SAMPLES_PER_STEP) for step in range(1, 9)]
    assert set(found) <= set(rows(output, "SELECT id, program FROM tasks"))


def test_a_full_disk_ends_the_run_by_name_and_it_goes_on_once_there_is_room(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("--output", str(output), *SMALL, "--max-lag", "2", "--steps", "3", "--journal.keep-steps", "0")
    whole = output / "checkpoints" / "step-000003"
    for most_bytes, named in ((60_000, "journal.sqlite cannot be written"), (2_500_000, "step-000006 could not be")):
        done = run_with_files_of(most_bytes, "--resume", str(output), "--steps", "6")
        assert done.returncode == 1
        assert named in done.stderr
        assert "resume" in done.stderr
        assert {path.name for path in (output / "checkpoints").iterdir()} == {"step-000000", whole.name}
    run("--resume", str(output), "--steps", "9")
    assert [line["version"] for line in lines(output)] == list(range(1, 10))
    trained = rows(output, "SELECT step, samples FROM sums WHERE stage = 'trained' ORDER BY step")
    assert trained == [(step, SAMPLES_PER_STEP) for step in range(1, 10)]
    (closed,), (summed,) = (rows(output, f"SELECT sum(samples) FROM {table}") for table in ("closed", "steps"))
    assert closed == summed > (0,)  # what ended before the oldest checkpoint is a sum
