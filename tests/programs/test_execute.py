"""`execute`: JSON lines of untrusted programs in, one answer for each out, in order and at once."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from azr_async.errors import SandboxError
from azr_async.programs.execute import main
from azr_async.programs.jsonl import InputError, run_tool

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
    limits = {0: "wall", 5: "memory", 6: "output"}
    assert {number: row.pop("limit") for number, row in enumerate(rows) if "limit" in row} == limits
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


WRONG_USAGE = [
    ["--runs", "0"],
    ["--runs", "1000000"],
    ["--wall-seconds", "-1"],
    ["--wall-seconds", "nan"],
    ["--cpu-seconds", "inf"],
    ["--input-mode", "x"],
    ["/no/such/file"],
    ["--memory-mb", "a"],
    ["--memory-mb", "9999999999999999"],
    ["--workers", "abc"],
    ["--workers", "100000"],
    ["--workers", "9" * 5000],
]


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_told_in_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(("execute: ", "python -m azr_async execute: error: argument --"))
    assert "from 1 to" in message or "seconds above 0" in message or "choose" in message or "Name a file" in message


@pytest.mark.parametrize("how", ["same", "symbolic", "hard", "part"])
def test_the_file_that_is_read_is_never_written(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if how == "part":
        source = tmp_path / "out.jsonl.part"
    source.write_text(line("def f(x): return x") + "\n")
    if how == "same":
        output = source
    elif how == "symbolic":
        output.symlink_to(source)
    elif how == "hard":
        output.hardlink_to(source)
    before = source.read_bytes()
    assert main([str(source), "--output", str(output), "--workers", "1"]) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_an_older_file_of_answers_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    output.write_text("old\n")
    source.write_text(line("def f(x): return x") + "\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    assert main([str(source), "--output", str(link), "--allowed-imports", "no_such_module", "--workers", "1"]) == 1
    assert output.read_text() == "old\n"
    assert main([str(source), "--output", str(link), "--workers", "1"]) == 0
    assert link.is_symlink()
    assert json.loads(output.read_text())["value"] == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link.jsonl", "out.jsonl"]


def shell(command: str, *, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """`execute` stands for the tool."""
    tool = f"{sys.executable} -m azr_async execute --workers 1"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {re.sub('^execute', tool, command)}"],
        env={"PYTHONPATH": os.fspath(ROOT), "PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("execute {file} | head -n 1", 141, ""),
        ("execute --explain | true", 141, ""),
        ("execute {file} >/dev/full", 2, "No space left on device"),
        ("execute --explain >/dev/full", 2, "No space left on device"),
        ("execute - <&-", 2, "standard input is closed"),
        ("execute {file} >&-", 2, "standard output is closed"),
        ("execute {file} --output /dev/full", 2, "No space left on device"),
        ("execute /", 2, "Is a directory"),
    ],
)
def test_a_closed_or_full_end_is_told_in_a_line_at_most(
    tmp_path: Path, command: str, status: int, message: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(line("def f(x): return 'a' * 9_000", str(n)) + "\n" for n in range(300)))
    done = shell(command.format(file=file))
    assert (done.returncode, message in done.stderr) == (status, True), done.stderr
    assert len(done.stderr.splitlines()) == (1 if message else 0), done.stderr


def test_one_ctrl_c_is_enough_when_nobody_reads() -> None:
    with stream() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(40):
            process.stdin.write(line("def f(x): return 'a' * 9_000", str(number)) + "\n")
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_an_identity_that_json_lacks_is_a_bad_line(tmp_path: Path) -> None:
    rows = execute(
        tmp_path,
        ['{"id": NaN, "program": "def f(x): return x", "input": "1"}', '{"id": 1e999, "program": "", "input": ""}'],
    )
    assert [(row["id"], row["status"]) for row in rows] == [(None, "error")] * 2
    assert all("not JSON" in row["error"] for row in rows)


def test_cpu_time_has_an_option(tmp_path: Path) -> None:
    program = line("def f(x):\n    while True: pass")
    rows = execute(tmp_path, [program], "--wall-seconds", "60", "--cpu-seconds", "1")
    assert (rows[0]["status"], rows[0]["error"]) == ("timeout", "CPU time")


def test_best_effort_warns_where_the_isolation_does_not_hold(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(line("def f(x): return x") + "\n")
    done = shell(f"{sys.executable} -c '{WITHOUT_SECCOMP}' execute {file} --workers 1 --require best-effort")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: the sandbox does not hold: a program could open a socket")
    assert json.loads(done.stdout)["value"] == "1"
    done = shell(f"{sys.executable} -c '{WITHOUT_SECCOMP}' execute --explain --workers 1")
    assert done.returncode == 1
    assert "strict: refuses to start" in done.stdout


WITHOUT_SECCOMP = """
import os, struct, sys
from azr_async.adapters.sandbox.inside import kernel
from azr_async.__main__ import main
number = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
filter = struct.pack("<HBBI", 0x20, 0, 0, 0)
filter += struct.pack("<HBBI", 0x15, 0, 1, number) + struct.pack("<HBBI", 0x06, 0, 0, 0x00050001)
filter += struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.seccomp_filter(filter)()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("reason", "status"), [(SandboxError("told. Do so."), 1), (InputError("told. Do so."), 2)])
def test_a_failure_of_several_tasks_is_told_in_a_line(
    reason: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail(options: argparse.Namespace) -> int:
        raise ExceptionGroup("tasks", [ExceptionGroup("inner", [reason]), reason])

    assert run_tool(argparse.ArgumentParser(prog="azr_async tool"), [], fail) == status
    assert capsys.readouterr().err == "tool: told. Do so.\n"
