"""Whole runs, as a user starts them: real processes, real sockets, the shipped starter."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.random_models import byte_tokenizer

SMALL = (
    *("--flow.propose-samples", "2", "--flow.solve-samples", "8", "--solve.attempts", "4"),
    *("--solve.trained-attempts", "4", "--library.seed-tasks", "4", "--checkpoint.every-steps", "2"),
)
RUN_SECONDS = 240.0
SETTLE_SECONDS = 5.0
"""The kernel may still be clearing away what was killed."""

Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., str]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


@pytest.fixture
def run(start: Start) -> Run:
    """A whole run: its folder, then options."""

    def run_to_its_end(output: Path, *options: str) -> str:
        process = start("--output", str(output), *SMALL, *options)
        text, error = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 0, error + _logs(output)
        return text

    return run_to_its_end


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def processes_of(output: Path) -> list[psutil.Process]:
    """What is alive of the run after a moment; every process of a run has its directory in its command line."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(output) in word for word in process.info["cmdline"] or [])
    ]
    _, alive = psutil.wait_procs(found, timeout=SETTLE_SECONDS)
    return alive


def _logs(output: Path) -> str:
    return "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(output.glob("logs/*.log")))


def test_two_workers_and_two_ranks_stream_learn_and_leave_nothing(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "run"
    text = run(output, "--steps", "4", "--inference-workers", "2", "--learner-ranks", "2", "--max-lag", "1")
    metrics = lines(output)
    assert [line["version"] for line in metrics] == [0, 1, 2, 3, 4]
    assert all(line["lag"]["max"] <= line["lag"]["bound"] == 1 for line in metrics)
    assert all(line["weights"]["canary_max_logp_error"] < 1e-4 for line in metrics)
    assert metrics[0]["eval"]["n"] == metrics[-1]["eval"]["n"] == 900
    assert {path.stem for path in (output / "logs").iterdir()} >= {"inference-1", "learner-1", "selfplay"}
    assert f"files    {output}" in text
    assert processes_of(output) == []
    AutoModelForCausalLM.from_pretrained(output / "checkpoints" / "step-000004")


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_leaves_nothing(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "run"
    process = start(
        "--output", str(output), *SMALL, "--steps", "500", "--evaluation.suite", "none", "--checkpoint.every-steps", "0"
    )
    assert process.stdout is not None
    for line in process.stdout:  # ends with the process, which pytest-timeout bounds
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60.0)
    assert process.returncode == 130, _logs(output)
    assert processes_of(output) == []
    last = lines(output)[-1]["step"]
    assert (output / "checkpoints" / f"step-{last:06d}" / "model.safetensors").exists()


@pytest.mark.parametrize("program", ["inference-0", "selfplay", "learner-0"])
def test_a_killed_program_ends_the_run_by_name(tmp_path: Path, program: str, start: Start) -> None:
    output = tmp_path / "run"
    process = start(
        *("--output", str(output), *SMALL, "--steps", "500", "--evaluation.suite", "none", "--run.max-restarts", "0"),
        *(("--learner-ranks", "2") if program == "learner-0" else ()),  # the other rank waits for it
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    victim_of(output, program).kill()
    _, error = process.communicate(timeout=60.0)
    assert process.returncode == 1
    assert program in error
    assert "SIGKILL" in error
    assert processes_of(output) == []


def victim_of(output: Path, program: str) -> psutil.Process:
    """The process of one program of a run."""
    module, _, number = program.partition("-")
    (victim,) = [
        found
        for found in psutil.process_iter(["cmdline"])
        if f"azr_async.programs.{module}" in (words := found.info["cmdline"] or [])
        and str(output) in words
        and number in ("", *words)
    ]
    return victim


def test_a_run_goes_on_without_a_worker_that_is_killed_and_takes_it_in_again(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "run"
    process = start(
        *("--output", str(output), *SMALL, "--steps", "5000", "--inference-workers", "2", "--max-lag", "1"),
        *("--evaluation.suite", "none", "--checkpoint.every-steps", "0"),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            victim_of(output, "inference-1").kill()
        if line.startswith("step ") and is_complete_again(output):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60.0)
    assert process.returncode == 130, error + _logs(output)
    metrics = lines(output)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    assert all(line["lag"]["max"] <= line["lag"]["bound"] == 1 for line in metrics)
    assert metrics[-1]["engines"]["lost_workers"] == 1
    assert metrics[-1]["engines"]["workers"] == 2
    assert "inference worker inference-1 was lost" in (output / "logs" / "learner-0.log").read_text()
    assert processes_of(output) == []


def is_complete_again(output: Path) -> bool:
    """Has self-play lost a worker, and two of them with the weights of now?"""
    engines = lines(output)[-1]["engines"]
    return bool(engines["lost_workers"] and engines["workers"] == 2)


@pytest.mark.parametrize("dialogue", ["azr-base", "azr-chat"])
def test_a_real_architecture_runs_with_the_full_prompts(tmp_path: Path, dialogue: str, run: Run) -> None:
    """A random model proposes nothing valid: the run must train all the same, on what there is."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=258,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=8192,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    run(
        tmp_path / "run",
        *("--model", str(tmp_path / "model"), "--model.dialogue", dialogue, "--steps", "2"),
        *("--engine.context-tokens", "8192", "--engine.slots", "16", "--learner.microbatch-tokens", "16384"),
        *("--library.seed-proposals", "8", "--evaluation.suite", "none"),
    )
    metrics = lines(tmp_path / "run")
    assert metrics[-1]["version"] == 2
    assert metrics[-1]["reward"]["propose_deduction"] == -1.0
    assert metrics[-1]["weights"]["canary_max_logp_error"] < 1e-4
