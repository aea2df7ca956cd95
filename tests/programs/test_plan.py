"""The planner on written traces: it finds the speeds that the trace was written with, and says what it cannot know."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml

from azr_async.config import Config
from azr_async.errors import ConfigError
from azr_async.messages import CELLS, cell_name
from azr_async.programs.plan import main, stretch_of
from azr_async.programs.trace import read_trace

STEP, ROW, PREFILL, PROMPT, FORK, FILE, LEARNER, TOKEN = 0.004, 0.0001, 0.001, 0.002, 0.003, 0.0005, 0.05, 0.0001
INSTALL = 0.015

Run = Callable[..., Path]


def line(step: int, rows: list[int]) -> dict[str, Any]:
    """The numbers that a run with these speeds would write; `rows` are those of each engine step so far."""
    tokens = 1000 + 100 * (step % 3)
    seconds = [STEP + ROW * count for count in rows]
    prompts = [1 + n % 5 for n in range(10 * step)]
    prefill_seconds = [PREFILL + PROMPT * count for count in prompts]
    return {
        "step": step,
        "version": step,
        "wall_seconds": 0.5 * step,
        "ess": 1.0 / 1.01,
        "lag": {"mean": 1.0, "max": 2, "bound": 2},
        "valid_rate": {"deduction": 0.8, "abduction": 0.9, "induction": None},
        "tokens": {"trained": tokens, "generated": tokens},
        "samples": {"trained": 312},
        "busy": {"inference": 0.5, "learner": 0.3, "sandbox": 0.2},
        "cpu": {"selfplay": FILE * 312, "sandbox": FORK * 300, "learner": LEARNER + TOKEN * tokens},
        "weights": {"push_seconds": 0.03, "pause_seconds": 0.01},
        "train_seconds": LEARNER + TOKEN * tokens,
        "cells": {
            cell_name(cell): {"n": 8 if cell[0] == "propose" else 96, "tokens": 9.0, "tokens_std": 2.0}
            for cell in CELLS
        },
        "sandbox": {"forks": 300.0 * step, "busy_seconds": 300.0 * FORK * step},
        "engines": {
            "cpu_seconds": sum(seconds) + sum(prefill_seconds) + INSTALL * step,
            "pace": {
                "steps": len(rows),
                "rows": sum(rows),
                "rows_squared": sum(count * count for count in rows),
                "step_seconds": sum(seconds),
                "rows_seconds": sum(count * second for count, second in zip(rows, seconds, strict=True)),
                "prefills": len(prompts),
                "prompts": sum(prompts),
                "prompts_squared": sum(count * count for count in prompts),
                "prefill_seconds": sum(prefill_seconds),
                "prompts_seconds": sum(count * second for count, second in zip(prompts, prefill_seconds, strict=True)),
                "installs": step,
                "install_seconds": INSTALL * step,
            },
        },
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Run:
    def write(steps: int = 20, **config: Any) -> Path:  # noqa: ANN401
        rows = list(accumulate(([(37 * step) % 256 + 1] * 20 for step in range(1, steps + 1)), initial=list[int]()))
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump(json.loads(Config.model_validate(config).model_dump_json()))
        )
        text = "".join(json.dumps(line(step, rows[step])) + "\n" for step in range(1, steps + 1))
        (tmp_path / "metrics.jsonl").write_text(text)
        return tmp_path

    return write


@contextmanager
def rewritten(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The lines of a trace, which are what the block has made of them afterwards."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    yield lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_speeds_of_a_trace_are_found(run_dir: Run) -> None:
    machine = read_trace(run_dir(), cores=2).machine
    assert machine.step_seconds == pytest.approx(STEP, rel=1e-3)
    assert machine.row_seconds == pytest.approx(ROW, rel=1e-3)
    assert machine.prefill_seconds == pytest.approx(PREFILL)
    assert machine.prompt_seconds == pytest.approx(PROMPT)
    assert machine.check_seconds == pytest.approx(FORK)
    assert machine.file_seconds == pytest.approx(FILE)
    assert machine.learner_seconds == pytest.approx(LEARNER)
    assert machine.learner_token_seconds == pytest.approx(TOKEN)
    assert machine.pause_seconds == pytest.approx(INSTALL)
    assert machine.cores == 2


def test_what_an_engine_did_before_the_steps_that_count_does_not(run_dir: Run) -> None:
    folder = run_dir()
    with rewritten(folder) as lines:
        for one in lines:  # counters only grow: a slow beginning is in all of them
            for name in ("step_seconds", "prefill_seconds"):
                one["engines"]["pace"][name] += 1000.0
    machine = read_trace(folder, cores=None).machine
    assert machine.step_seconds == pytest.approx(STEP, rel=1e-3)
    assert machine.prompt_seconds == pytest.approx(PROMPT)


def test_a_trace_without_counted_prefills_and_installs_knows_what_prompts_and_rows_take(
    run_dir: Run,
) -> None:
    """As those of before 2026-11-24."""
    folder = run_dir()
    with rewritten(folder) as lines:
        for one in lines:
            for name in ("prefills", "prompts_squared", "prompts_seconds", "installs", "install_seconds"):
                del one["engines"]["pace"][name]
    machine = read_trace(folder, cores=2).machine
    assert machine.pause_seconds == 0.01
    assert machine.row_seconds > ROW  # what is not counted as anything else is put upon the rows
    assert machine.prefill_seconds == 0.0
    assert machine.prompt_seconds == pytest.approx(PROMPT + PREFILL / 3)


def test_the_work_of_a_trace_is_found(run_dir: Run) -> None:
    work = read_trace(run_dir(), cores=None).workload
    assert work.valid_rate == pytest.approx(0.85)
    assert work.ess_loss == pytest.approx(0.01)
    assert work.cells["solve", "deduction"].checks == 0.0
    runs = sum((8 if cell[0] == "propose" else 96) * load.checks for cell, load in work.cells.items())
    assert runs == pytest.approx(300)


def test_attempts_that_are_not_trained_cost_as_much_as_those_that_are(run_dir: Run) -> None:
    trace = read_trace(run_dir(solve={"attempts": 20, "trained_attempts": 12}), cores=2)
    solved = 3 * 96 + 8 * (0.8 + 0.9) * (20 - 12)  # nothing is known of induction's proposals
    assert trace.machine.file_seconds == pytest.approx(FILE * 312 / (3 * 8 + solved))
    cells = trace.workload.cells
    runs = 8 * sum(cells["propose", task].checks for task in trace.workload.tasks)
    runs += (96 + 8 * 0.9 * 8) * cells["solve", "abduction"].checks + 96 * cells["solve", "induction"].checks
    assert runs == pytest.approx(300)


def test_what_an_evaluation_costs_is_nobodys_price(run_dir: Run) -> None:
    """Its usage comes with the batches of the three steps after it."""
    folder = run_dir()
    with rewritten(folder) as lines:
        lines[9]["eval"] = {"n": 900}
        for one in lines[10:13]:
            one["cpu"]["selfplay"] *= 3.0
            one["wall_seconds"] += 1.0
        for one in lines[13:]:
            one["wall_seconds"] += 1.0
    trace = read_trace(folder, cores=2)
    assert trace.machine.file_seconds == pytest.approx(FILE)
    assert trace.steps_per_second == pytest.approx(2.0)


def test_batches_that_are_alike_cost_in_proportion_to_their_tokens(run_dir: Run) -> None:
    folder = run_dir()
    with rewritten(folder) as lines:
        for number, one in enumerate(lines):
            one["tokens"]["trained"] = 1000 + number % 2
            one["cpu"]["learner"] = 0.2 * (1.05 if number % 3 else 0.95)
    machine = read_trace(folder, cores=2).machine
    assert machine.learner_token_seconds * 1000 == pytest.approx(0.2, rel=0.05)
    assert machine.learner_seconds < 0.01


@pytest.mark.parametrize("stretch", [1.0, 3.0])
def test_predictions_take_as_long_as_the_trace_did(
    run_dir: Run, capsys: pytest.CaptureFixture[str], stretch: float
) -> None:
    """What the model leaves out is in the trace's rate, and in that of others then."""
    folder = run_dir()
    factor = stretch / stretch_of(read_trace(folder, cores=2), steps=40)
    with rewritten(folder) as lines:
        for one in lines:
            one["wall_seconds"] *= factor
    assert main(["--trace", str(folder), "--max-lag", "2", "--cores", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plans"][0]["steps_per_second"] == pytest.approx(2.0 / factor)
    assert any("to be trusted less" in note for note in answer["notes"]) == (stretch > 1)


def test_splits_and_lags_are_predicted_and_one_is_recommended(run_dir: Run, capsys: pytest.CaptureFixture[str]) -> None:
    trace = run_dir()
    assert main(["--trace", str(trace), "--gpus", "3", "--max-lag", "0,2", "--steps", "12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    plans = {(one["inference_gpus"], one["train_gpus"], one["max_lag"]): one for one in answer["plans"]}
    assert plans.keys() == {(1, 2, 0), (1, 2, 2), (2, 1, 0), (2, 1, 2)}
    assert plans[2, 1, 2]["tokens_per_second"] > plans[2, 1, 0]["tokens_per_second"]
    assert plans[2, 1, 0]["lag_mean"] == 0
    assert plans[2, 1, 0]["ess"] == 1.0
    assert answer["recommended"]["useful_tokens_per_second"] >= 0.98 * max(
        one["useful_tokens_per_second"] for one in answer["plans"]
    )
    assert "limits it" in answer["reason"]


def test_the_table_names_the_options_to_use(run_dir: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(run_dir()), "--max-lag", "1", "--steps", "8", "--cores", "2"]) == 0
    text = capsys.readouterr().out
    assert "Recommended: --max-lag 1." in text
    assert "The trace ran 2 steps/s" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpus", "1"], "--gpus 1 cannot be split: engines span 1 of them"),
        (["--gpus", "4", "--split", "4+1"], "--split 4+1 cannot be had of 4 GPUs"),
        (["--split", "1+1"], "--split needs --gpus"),
    ],
)
def test_an_impossible_split_is_one_clear_error(
    run_dir: Run, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main(["--trace", str(run_dir()), *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_trace_that_is_too_short_says_how_to_make_a_longer_one(
    run_dir: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(run_dir(7))]) == 2
    assert "has 2 steps to learn from" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no metrics\.jsonl in"):
        read_trace(tmp_path, cores=2)
