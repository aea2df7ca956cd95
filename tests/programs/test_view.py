"""What is shown while a run goes, and what is told when it has ended."""

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists
from rich.console import Console

from azr_async.messages import CELLS, TASKS, Progress, cell_name
from azr_async.programs.summary import (
    MetricsReader,
    how_it_ended,
    how_it_failed,
    how_it_was_interrupted,
    last_lines,
    what_was_learned,
)
from azr_async.programs.supervision import Ended, RunEnd
from azr_async.programs.view import View, ViewState, duration, panel, plain_line


def metrics(step: int, **more: object) -> dict[str, Any]:
    return {
        "step": step,
        "wall_seconds": 2.0 * step,
        "lag": {"mean": 1.25, "max": 2, "bound": 2},
        "reward": {cell_name(cell): 0.5 for cell in CELLS},
        "valid_rate": dict.fromkeys(TASKS, 0.75),
        "solve_rate": dict.fromkeys(TASKS, None),
        "tokens": {"generated": 9000, "trained": 8000, "dropped": 10},
        "samples": {"trained": 300, "dropped": 3},
        "busy": {"inference": 0.6, "learner": 0.9, "sandbox": 0.1},
        "weights": {"push_seconds": 0.1, "pause_seconds": 0.012, "canary_max_logp_error": 3e-6},
        **more,
    }


def evaluation(mean: float) -> dict[str, Any]:
    return {"deduction": mean, "abduction": mean, "induction": mean, "mean": mean, "n": 900}


def shown(state: ViewState, *, is_terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=is_terminal, color_system=None)
    console.print(panel(state, 75.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain_output(state: ViewState) -> str:
    console = Console(file=io.StringIO(), width=100)
    with View(console, state) as view:
        view.redraw()
        view.redraw()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_before_the_first_step_the_view_tells_what_each_program_does() -> None:
    state = ViewState(steps=120, processes={"selfplay": "running", "learner-0": "starting"})
    state.hear(Progress(process="selfplay", phase="seeding", done=12, total=64))
    assert "seeding 12/64" in shown(state)
    assert "starting" in shown(state)
    assert plain_output(state) == "selfplay: seeding 12/64\n"


def test_the_view_tells_the_step_the_cells_the_lag_and_the_time_left() -> None:
    state = ViewState(steps=120, processes={"learner-0": "running"})
    state.take(
        [metrics(0, eval=evaluation(0.184)), *map(metrics, range(1, 30)), metrics(30, eval=evaluation(0.31))], {}
    )
    text = shown(state)
    assert "step 30/120" in text
    assert "3 min 0 s left" in text
    assert "mean 1.25, max 2 of 2" in text
    assert "inference 60%" in text
    assert "4,500/s generated" in text
    assert "31.0% (at the start 18.4%) on 900 tasks" in text
    assert "+0.50" in text


def test_without_a_terminal_each_step_is_one_line_once() -> None:
    state = ViewState(steps=120, processes={})
    state.take([metrics(1), metrics(2)], {})
    lines = plain_output(state).splitlines()
    assert [line.split("   ")[0] for line in lines] == ["step 1/120", "step 2/120"]


def test_a_step_without_numbers_is_still_a_line() -> None:
    empty = dict.fromkeys(["reward", "lag", "valid_rate", "busy", "eval"])
    assert plain_line({"step": 3, **empty}, 9) == "step 3/9"


def test_what_happened_unexpectedly_is_shown_and_said_once() -> None:
    state = ViewState(steps=9, processes={"inference-0": "restarting"}, news=["inference-0 was lost"])
    assert "inference-0 was lost" in shown(state)
    assert "restarting" in shown(state)
    assert plain_output(state) == "inference-0 was lost\n"


def test_the_view_says_that_it_is_stopping() -> None:
    assert "Ctrl-C again stops at once" in shown(ViewState(steps=1, processes={}, is_stopping=True))


@given(cuts=lists(integers(0, 200), max_size=6), steps=integers(0, 8))
def test_lines_are_read_once_and_whole_however_they_arrive(
    cuts: list[int], steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    data = b"".join(json.dumps({"step": step}).encode() + b"\n" for step in range(steps))
    reader, seen = MetricsReader(path), []
    for end in [*sorted(cuts), len(data)]:
        path.write_bytes(data[:end])
        seen.extend(reader.new_lines())
    assert seen == [{"step": step} for step in range(steps)]


def test_a_resumed_view_starts_after_the_steps_of_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 5}\n')
    assert MetricsReader(path, first_step=5).new_lines() == [{"step": 5}]
    assert MetricsReader(tmp_path / "none").new_lines() == []


def test_the_summary_tells_in_words_what_happened(tmp_path: Path) -> None:
    lines = [metrics(0, eval=evaluation(0.184)), *map(metrics, range(1, 40)), metrics(40, eval=evaluation(0.339))]
    (tmp_path / "checkpoints" / "step-000040").mkdir(parents=True)
    text = what_was_learned(lines, tmp_path)
    assert "Done: 40 steps in 1 min 20 s" in text
    assert "accuracy 18.4% -> 33.9% (+15.5 points) on 900 held-out tasks" in text
    assert "samples lagged 1.25 optimizer steps on average, 2 at most (bound 2); 1.0% were dropped" in text
    assert "inference 60%, learner 90%, sandbox 10% of the time" in text
    assert "360,000 generated, 320,000 trained (4,000 per second)" in text
    assert "40 pushes" in text
    assert "3.0e-06 nats" in text
    assert str(tmp_path / "checkpoints" / "step-000040") in text


def test_the_summary_warns_of_a_sandbox_that_did_not_hold(tmp_path: Path) -> None:
    assert "does not hold" not in what_was_learned([metrics(1)], tmp_path)
    text = what_was_learned([metrics(1, sandbox={"weakness": "the sandbox does not hold: ..."}), metrics(2)], tmp_path)
    assert "sandbox  the sandbox does not hold" in text


def test_the_summary_tells_of_restarts(tmp_path: Path) -> None:
    assert "restarts" not in what_was_learned([metrics(1)], tmp_path)
    text = what_was_learned([metrics(1)], tmp_path, {"inference-1": 1, "inference-0": 2})
    assert "restarts inference-0 2 times, inference-1 1 time;" in text


def test_the_summary_does_not_claim_what_was_not_measured(tmp_path: Path) -> None:
    assert "not measured" in what_was_learned([metrics(1)], tmp_path)
    assert "without a training step" in what_was_learned([], tmp_path)


def test_after_an_interruption_the_way_to_go_on_is_told(tmp_path: Path) -> None:
    assert "nothing to save yet" in how_it_was_interrupted([], 120, tmp_path)
    (tmp_path / "checkpoints" / "step-000007").mkdir(parents=True)
    text = how_it_was_interrupted([metrics(7)], 120, tmp_path)
    assert f"python run.py --resume {tmp_path}/checkpoints/step-000007" in text


def test_a_signal_is_told_by_its_name() -> None:
    segv, kill, three = (
        Ended(name="selfplay", status=status, at_seconds=0.0, was_told=False)
        for status in (-signal.SIGSEGV, -signal.SIGKILL, 3)
    )
    assert how_it_ended(segv) == "was killed by SIGSEGV."
    assert "memory" in how_it_ended(kill)
    assert how_it_ended(three) == "ended with exit status 3."


def test_a_failure_without_words_shows_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "learner-0.log").write_text("".join(f"line {n}\n" for n in range(5000)))
    dead = Ended(name="learner-0", status=-11, at_seconds=0.0, was_told=False)
    text = how_it_failed(RunEnd(kind="failed", programs=(dead,)), dead, "", tmp_path)
    assert "line 4999" in text
    assert text.count("\n") == 13
    assert last_lines(tmp_path / "none") == []


def test_durations_are_told_as_people_do() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 185, 7800)] == ["0 s", "59 s", "3 min 5 s", "2 h 10 min"]
