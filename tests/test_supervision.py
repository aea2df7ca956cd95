"""Whole runs of which programs are lost, hang, come and go: the run goes on, or ends by name and can be continued."""

import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from azr_async.__main__ import main as tools
from tests.test_end_to_end import SMALL, Start, _logs, lines, processes_of, victim_of

SAMPLES_PER_STEP = 3 * (2 + 8)
QUICK = (
    *SMALL,
    *("--evaluation.suite", "none", "--checkpoint.every-steps", "4", "--wires.heartbeat-seconds", "0.5"),
)


def at_steps(process: "subprocess.Popen[str]", deeds: dict[int, Callable[[], object]]) -> str:
    """Do something when a step is told; what was printed until the end."""
    assert process.stdout is not None
    text = []
    for line in process.stdout:  # ends with the process, which pytest-timeout bounds
        text.append(line)
        for step in [step for step in deeds if line.startswith(f"step {step}/")]:
            deeds.pop(step)()
    return "".join(text)


def rows(output: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(output / "journal.sqlite")) as journal:
        return journal.execute(query).fetchall()


def assert_whole(output: Path, steps: int, *, max_lag: int) -> None:
    metrics = lines(output)
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    assert all(line["lag"]["max"] <= line["lag"]["bound"] == max_lag for line in metrics)
    trained = rows(output, "SELECT step, count(*) FROM samples WHERE stage = 'trained' GROUP BY step ORDER BY step")
    assert trained == [(step, SAMPLES_PER_STEP) for step in range(1, steps + 1)]
    assert processes_of(output) == []


def kill(output: Path, program: str) -> None:
    victim_of(output, program).kill()


def kill_sandbox(output: Path) -> None:
    for child in victim_of(output, "selfplay").children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def test_self_play_and_its_sandbox_are_lost_twice_and_go_on_from_the_journal(tmp_path: Path, start: Start) -> None:
    output, found = tmp_path / "run", list[tuple[object, ...]]()

    def lose() -> None:
        kill(output, "selfplay")
        found.extend(rows(output, "SELECT id, program FROM tasks"))

    process = start(
        *("--output", str(output), *QUICK, "--steps", "12", "--max-lag", "1", "--inference-workers", "2"),
    )
    text = at_steps(
        process,
        {
            2: partial(kill_sandbox, output),
            3: lose,
            6: partial(kill_sandbox, output),
            8: lose,
        },
    )
    assert process.wait(60) == 0, _logs(output)
    assert_whole(output, 12, max_lag=1)
    assert set(found) <= set(rows(output, "SELECT id, program FROM tasks"))
    assert "selfplay was killed by SIGKILL." in text
    assert "restarts selfplay 2 times" in text
    assert "starts again" not in text.replace("It starts again in 1 s (1", "").replace("It starts again in 2 s (2", "")
    assert (output / "logs" / "learner-0.log").read_text().count("self-play was lost") == 2


def test_a_self_play_that_hangs_is_killed_and_another_one_goes_on(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "run"
    process = start(
        *("--output", str(output), *QUICK, "--steps", "8", "--max-lag", "2", "--wires.peer-timeout-seconds", "6"),
    )
    text = at_steps(process, {3: lambda: os.kill(victim_of(output, "selfplay").pid, signal.SIGSTOP)})
    assert process.wait(60) == 0, _logs(output)
    assert_whole(output, 8, max_lag=2)
    assert "selfplay had not answered for wires.peer_timeout_seconds, so it was killed." in text


def test_the_loss_of_a_learner_rank_ends_the_run_and_one_command_goes_on(tmp_path: Path, start: Start) -> None:
    output = tmp_path / "run"
    process = start("--output", str(output), *QUICK, "--steps", "8", "--max-lag", "1", "--learner-ranks", "2")
    at_steps(process, {6: partial(kill, output, "learner-1")})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "learner-1 was killed by SIGKILL." in error
    checkpoint = output / "checkpoints" / "step-000004"
    assert f"Go on with: python run.py --resume {checkpoint}" in error
    assert processes_of(output) == []
    resumed = start("--resume", str(checkpoint))
    text, error = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, error + _logs(output)
    assert "step 5/8" in text
    assert "step 4/8" not in text
    assert_whole(output, 8, max_lag=1)


def test_workers_are_added_and_removed_while_the_run_goes_on(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    process = start("--output", str(output), *QUICK, "--steps", "5000", "--max-lag", "1")

    def order(*options: str) -> int:
        return tools(["workers", str(output), *options])

    assert process.stdout is not None
    statuses: list[int] = []
    for line in process.stdout:
        if line.startswith("step 2/"):
            statuses += [order("--remove", "inference-0"), order("--remove", "inference-9"), order("--add", "1")]
        if len(statuses) == 3 and line.startswith("step") and lines(output)[-1]["engines"]["workers"] == 2:
            statuses.append(order("--remove", "inference-0"))
            left = lines(output)[-1]["step"]
        if len(statuses) == 4 and line.startswith("step") and lines(output)[-1]["step"] > left + 5:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, statuses) == (130, [2, 2, 0, 0]), error + _logs(output)
    told = capsys.readouterr()
    assert "nobody would be left to generate" in told.err
    assert "inference-9 cannot be removed: the workers are inference-0." in told.err
    assert "inference-1 will get the newest weights, then jobs." in told.out
    metrics = lines(output)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[-1]["engines"]["workers"] == 1
    assert "asked to stop" in (output / "logs" / "inference-0.log").read_text()
    assert processes_of(output) == []
    assert order("--add", "1") == 2
    assert "no run is going on in" in capsys.readouterr().err
