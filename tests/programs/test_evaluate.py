"""`evaluate`: greedy accuracy on held-out tasks."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.messages import Outcome
from azr_async.programs.evaluate import main, wilson_interval
from azr_async.starter.suite import STARTER_SUITE, load_suite, write_suite

LIMITS = ["--workers", "2"]


def results(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["--model", "starter", "--json", *arguments, *LIMITS]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_starter_on_a_part_of_its_own_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_task = [problem for number, problem in enumerate(load_suite(STARTER_SUITE)) if number % 9 == 0]
    write_suite(tmp_path / "suite.jsonl", by_task)

    found = results(capsys, "--suite", str(tmp_path / "suite.jsonl"))

    assert set(found) == {"deduction", "abduction", "induction", "all"}
    assert found["all"]["n"] == sum(found[task]["n"] for task in found if task != "all") == 100
    assert 0.05 < found["all"]["accuracy"] < 0.3  # 15.9 % of all 900
    low, high = found["all"]["interval_95"]
    assert low < found["all"]["accuracy"] < high


ECHO = {"code": "def f(x):\n    return x", "input": "[1, 2]", "output": "[1, 2]"}
LENGTH = {"code": "def f(x):\n    return len(x)", "input": "[1, 2]", "output": "2"}


@pytest.mark.parametrize(("mode", "solved"), [("output", "deduction"), ("input", "abduction")])
def test_a_file_of_cruxevals_form(mode: str, solved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped starter solves one of the two either way: an echo's output, a list of a length (any is right)."""
    (tmp_path / "crux.jsonl").write_text(f"{json.dumps(ECHO)}\n\n{json.dumps(LENGTH)}\n", encoding="utf-8")

    found = results(capsys, "--suite", str(tmp_path / "crux.jsonl"), "--mode", mode)

    assert found.keys() == {solved, "all"}
    assert (found["all"]["n"], found["all"]["accuracy"]) == (2, 0.5)


def lose_literals(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the host keep the sandbox from reading any more of them."""
    read, calls = SandboxPool.literal, count()

    async def literal(self: SandboxPool, text: str) -> Outcome:
        return await read(self, text) if next(calls) < after else Outcome(status="lost", error="killed")

    monkeypatch.setattr(SandboxPool, "literal", literal)


def test_a_lost_answer_is_not_solved_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crux.jsonl").write_text(f"{json.dumps(ECHO)}\n{json.dumps(ECHO)}\n", encoding="utf-8")
    lose_literals(monkeypatch, after=3)  # two right answers are read, and one of the model's

    arguments = ["--model", "starter", "--json", "--suite", str(tmp_path / "crux.jsonl"), "--mode", "output"]
    assert main([*arguments, *LIMITS]) == 0

    told = capsys.readouterr()
    assert {key: json.loads(told.out)["all"][key] for key in ("n", "accuracy", "lost")} == {
        "n": 2,
        "accuracy": 0.5,
        "lost": 1,
    }
    assert told.err.count("1 answers were lost") == 1


def test_a_lost_right_answer_is_not_the_files_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crux.jsonl").write_text(f"{json.dumps(ECHO)}\n", encoding="utf-8")
    lose_literals(monkeypatch, after=0)

    assert main(["--model", "starter", "--suite", str(tmp_path / "crux.jsonl"), "--mode", "output", *LIMITS]) == 1

    assert "line 1: could not be run: killed; free memory, then try again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--suite", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--suite", "nowhere.jsonl", "--mode", "input"], "nowhere.jsonl"),
        (["--model", "nowhere"], "nowhere"),
        (["--slots", "0"], "--slots"),
        (["--mode", "both"], "--mode"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--model", "starter", *LIMITS, *arguments])

    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status in (1, 2)
    assert told in last


def test_a_line_that_is_no_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "crux.jsonl").write_text('{"code": "def f(x): return x", "input": "1"}\n', encoding="utf-8")

    assert main(["--model", "starter", "--suite", str(tmp_path / "crux.jsonl"), "--mode", "input", *LIMITS]) == 2

    assert "line 1" in capsys.readouterr().err


def test_wilsons_interval_of_a_known_case() -> None:
    """Half of 100: 50 % +- 1.96 sqrt(0.25 / (100 + 1.96^2)), by hand."""
    low, high = wilson_interval(50, 100)
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)


@given(asked=some.integers(0, 2000), share=some.floats(0, 1))
def test_wilsons_interval_holds_the_share(asked: int, share: float) -> None:
    right = round(asked * share)
    low, high = wilson_interval(right, asked)
    assert 0.0 <= low <= high <= 1.0
    assert not asked or low - 1e-9 <= right / asked <= high + 1e-9
