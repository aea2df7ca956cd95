"""`judge`: answers judged as self-play judges them."""

import json
from pathlib import Path
from typing import Any

import pytest

from azr_async.config import SandboxConfig
from azr_async.programs.judge import main

Row = dict[str, Any]

DEDUCTION: Row = {"task": "deduction", "program": "def f(x): return [x, 1.0]", "input": "True", "output": "[True, 1.0]"}
ABDUCTION: Row = {"task": "abduction", "program": "def f(x): return abs(x)", "output": "3"}
INDUCTION: Row = {"task": "induction", "pairs": [["1", "2"], {"input": "5", "output": "6"}]}
ALWAYS_EQUAL = "type('A', (), {'__eq__': lambda s, o: True})()"

QUESTIONS: list[tuple[Row, str, bool]] = [
    (DEDUCTION, "[True, 1.0]", True),
    (DEDUCTION, " [True,\n 1.0] ", True),
    (DEDUCTION, "[1, 1.0]", False),
    (DEDUCTION, "[True, 1]", False),
    (DEDUCTION, "(True, 1.0)", False),
    (DEDUCTION, ALWAYS_EQUAL, False),
    (DEDUCTION, "output", False),
    (DEDUCTION, "f(True)", False),
    ({key: DEDUCTION[key] for key in ("task", "program", "input")}, "[True, 1.0]", True),
    (ABDUCTION, "3", True),
    (ABDUCTION, "-3", True),
    (ABDUCTION, "-\n3", True),
    (ABDUCTION, "3.0", False),
    (ABDUCTION, "3) or (True", False),
    (ABDUCTION, ALWAYS_EQUAL, False),
    (INDUCTION, "def f(x): return x + 1", True),
    (INDUCTION, "def g(x): return x + 1\ndef f(x): return g(x)", True),
    (INDUCTION, "def f(x): return 2", False),
    (INDUCTION, "def f(x): return x + 1.0", False),
    (INDUCTION, f"def f(x): return {ALWAYS_EQUAL}", False),
    (INDUCTION, "def f(x): return output", False),
    (INDUCTION, "not a program", False),
]


def judge(tmp_path: Path, lines: list[str]) -> list[Row]:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main([str(source), "--output", str(output), "--workers", "1"]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_right_answers_and_no_others_are_correct(tmp_path: Path) -> None:
    lines = [json.dumps({"id": n, **row, "answer": answer}) for n, (row, answer, _) in enumerate(QUESTIONS)]
    rows = judge(tmp_path, lines)
    assert [row["id"] for row in rows] == list(range(len(QUESTIONS)))
    assert [set(row) for row in rows] == [{"id", "correct", "reason"}] * len(rows)
    assert [(answer, row["correct"]) for (_, answer, _), row in zip(QUESTIONS, rows, strict=True)] == [
        (answer, correct) for _, answer, correct in QUESTIONS
    ]


def test_answers_are_run_as_self_play_runs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["import random\ndef f(x): return x + 1", "def f(x): return [x + 1, bytearray(300 << 20)][0]"]
    rows = judge(tmp_path, [json.dumps({**INDUCTION, "answer": answer}) for answer in answers])
    assert [row["correct"] for row in rows] == [False, True]
    assert "import of random" in rows[0]["reason"]
    assert main(["--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(SandboxConfig().allowed_imports) in text


def test_a_program_that_counts_its_calls_is_not_correct(tmp_path: Path) -> None:
    counter = "import math\nmath.c = getattr(math, 'c', 0) + 1\ndef f(x): return math.c"
    rows = judge(tmp_path, [json.dumps({"task": "induction", "pairs": [["1", "1"], ["2", "2"]], "answer": counter})])
    assert rows[0]["correct"] is False
    assert "nondeterministic" in rows[0]["reason"]


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1", "1", "a"])
def test_a_tolerance_is_a_share(tolerance: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--relative-tolerance", tolerance]) == 2
    assert "from 0 to less than 1" in capsys.readouterr().err


def test_the_file_of_questions_is_never_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({**ABDUCTION, "answer": "3"}))
    assert main([str(source), "--output", str(source), "--workers", "1"]) == 2
    assert json.loads(source.read_text())["answer"] == "3"


def test_a_bad_line_is_not_correct_and_says_why(tmp_path: Path) -> None:
    bad: list[Row] = [
        {"task": "guess", "answer": "1"},
        {"task": "deduction", "answer": "1"},
        {"task": "deduction", "output": "f(1)", "answer": "1"},
        {"task": "abduction", "program": "def f(x): return x", "answer": "1"},
        {"task": "induction", "pairs": [], "answer": "1"},
        {"task": "induction", "pairs": [["1"]], "answer": "1"},
        {"task": "deduction", "output": "1"},
    ]
    rows = judge(tmp_path, ["{", *map(json.dumps, bad)])
    assert {row["correct"] for row in rows} == {False}
    assert all(row["reason"].startswith("bad line: ") for row in rows)
