"""A whole run on vLLM, as a user starts it. Skipped where vLLM is not installed."""

import importlib.util
from pathlib import Path

import pytest

from azr_async.starter.suite import STARTER_SUITE, load_suite, write_suite
from tests.test_end_to_end import SMALL, Start, lines, processes_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; README.md has the line for its CPU build",
    ),
]


def test_vllm_streams_takes_weights_in_flight_and_leaves_nothing(tmp_path: Path, start: Start) -> None:
    output, suite = tmp_path / "run", tmp_path / "suite.jsonl"
    write_suite(suite, load_suite(STARTER_SUITE)[::30])
    process = start(
        # Few slots, so that the engine is mostly busy when a push comes; eight pushes, for it may be idle at some.
        *("--output", str(output), *SMALL, "--engine", "vllm", "--engine.slots", "4", "--steps", "8", "--max-lag", "1"),
        *("--engine.on-new-weights", "recompute", "--evaluation.suite", str(suite), "--evaluation.proposals", "3"),
    )
    _, error = process.communicate(timeout=270.0)
    assert process.returncode == 0, error + (output / "logs" / "inference-0.log").read_text()[-3000:]
    metrics = lines(output)
    assert [line["version"] for line in metrics] == list(range(9))
    assert all(line["lag"]["max"] <= line["lag"]["bound"] == 1 for line in metrics)
    assert all(line["weights"]["canary_max_logp_error"] < 1e-4 for line in metrics)
    assert metrics[0]["eval"]["n"] == metrics[-1]["eval"]["n"] == 30
    assert sum(line["samples"].get("spanning", 0) for line in metrics) > 0, "no sequence met a push"
    assert processes_of(output) == []


def test_vllms_processes_do_not_outlive_their_worker(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "run"
    process = start(
        *("--output", str(output), *SMALL, "--engine", "vllm", "--steps", "100", "--evaluation.suite", "none"),
        *("--max-restarts", "0"),
    )
    assert process.stdout is not None
    for line in process.stdout:  # ends with the process, which pytest-timeout bounds
        if line.startswith("step 1/"):
            break
    ours = [other for other in processes_of(output) if "--index" in other.cmdline()]
    titles = [" ".join(other.cmdline()) for other in processes_of(output)]
    assert any("inference-0 of" in title and "EngineCore" in title for title in titles), titles
    for worker in ours:
        worker.kill()
    process.communicate(timeout=120.0)
    assert process.returncode == 1
    assert processes_of(output) == []
