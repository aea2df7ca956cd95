"""`execute`: JSON lines of untrusted programs in, one answer for each out, in order and at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from azr_async.programs.execute import main

ROOT = Path(__file__).parents[2]

Row = dict[str, Any]


def execute(tmp_path: Path, lines: list[str], *options: str) -> list[Row]:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main([str(source), "--output", str(output), "--workers", "1", *options]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def line(program: str, text: str = "1", identity: object = 0) -> str:
    return json.dumps({"id": identity, "program": program, "input": text})


def stream() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "azr_async", "execute", "-", "--workers", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={"PYTHONPATH": os.fspath(ROOT)},
    )


def test_every_line_is_answered_in_order(tmp_path: Path) -> None:
    rows = execute(
        tmp_path,
        [
            line("def f(x):\n    while True: pass", identity="slow"),
            line("def f(x): return {'b': (x,), 'a': {3, 1}}", "True", identity=7),
            line("def f(x): return 1 / 0", identity=None),
            line("import os\ndef f(x): return x"),
            line("def f(x): return x", "range(3)"),
            line("def f(x): return [0] * 10**10"),
            line("def f(x): return 'a' * 10**7"),
            line("def f(x): return id(x)"),
        ],
        "--wall-seconds",
        "1",
    )
    assert [row["id"] for row in rows[:3]] == ["slow", 7, None]
    assert [row["status"] for row in rows] == [
        *("timeout", "ok", "error", "rejected", "rejected", "memory", "output_too_long", "nondeterministic"),
    ]
    assert rows[1]["value"] == "{'b': (True,), 'a': {1, 3}}"
    assert [set(row) for row in rows] == [{"id", "status", "value", "error", "wall_ms"}] * len(rows)
    assert all((row["value"] is None) == (row["status"] != "ok") for row in rows)


def test_a_bad_line_is_an_answer_not_the_end(tmp_path: Path) -> None:
    rows = execute(
        tmp_path,
        [
            "not json",
            "[1]",
            '{"id": 3}',
            '{"id": 4, "program": 1, "input": "1"}',
            "[" * 100_000,
            "",
            line("def f(x): return x", identity=6),
        ],
    )
    assert [row["id"] for row in rows] == [None, None, 3, 4, None, 6]
    assert [row["status"] for row in rows] == [*["error"] * 5, "ok"]


def test_a_line_that_is_too_long_is_an_answer_too(tmp_path: Path) -> None:
    rows = execute(tmp_path, [line("#" + "a" * 5_000_000), line("def f(x): return x", identity=1)])
    assert [(row["id"], row["status"]) for row in rows] == [(None, "error"), (1, "ok")]


def test_expressions_are_evaluated_when_asked_for(tmp_path: Path) -> None:
    rows = execute(tmp_path, [line("def f(x): return list(x)", "range(3)")], "--input-mode", "expression")
    assert rows[0]["value"] == "[0, 1, 2]"


def test_one_run_finds_no_nondeterminism(tmp_path: Path) -> None:
    rows = execute(tmp_path, [line("def f(x): return id(x)")], "--runs", "1")
    assert rows[0]["status"] == "ok"


def test_a_stream_answers_each_line_before_the_next_is_written() -> None:
    with stream() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(line("def f(x): return x + 1", str(number), identity=number) + "\n")
            row = json.loads(process.stdout.readline())
            assert (row["id"], row["value"]) == (number, str(number + 1))
        process.stdin.close()
        assert process.wait(30) == 0


def test_an_interrupted_stream_ends_with_130_and_leaves_no_process() -> None:
    with stream() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line("def f(x): return x") + "\n")
        process.stdout.readline()
        process.stdin.write(line("def f(x):\n    while True: pass") + "\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    children = [path for path in Path("/proc").glob("[0-9]*/cmdline") if f'"parent": {process.pid}' in text_of(path)]
    assert children == []


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def test_a_killed_owner_leaves_no_process() -> None:
    with stream() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line("def f(x): return x") + "\n")
        process.stdout.readline()
        process.stdin.write(line("def f(x):\n    while True: pass") + "\n")
        mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if f'"parent": {process.pid}' in text_of(path)]
        assert mine
        descriptors = [os.pidfd_open(int(path.parent.name)) for path in mine]
        process.kill()
        process.wait(30)
        for descriptor in descriptors:
            assert wait_for_end(descriptor, seconds=10.0)
            os.close(descriptor)


def wait_for_end(descriptor: int, *, seconds: float) -> bool:
    import select

    return bool(select.select([descriptor], [], [], seconds)[0])


def test_explain_names_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "--workers", "1"]) == 0
    text = capsys.readouterr().out
    for layer in ("seccomp", "landlock", "namespaces", "rlimits", "no_new_privs", "canaries", "strict: starts here"):
        assert layer in text


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "0"], ["--wall-seconds", "-1"], ["--input-mode", "x"], ["/no/such/file"], ["--memory-mb", "a"]],
)
def test_wrong_usage_is_told_in_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err
