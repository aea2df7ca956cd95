"""What the host does to a program is no verdict on it; what a program does to itself is, under the limit's own name."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import pytest

from azr_async.adapters.sandbox import helpers, parsing
from azr_async.adapters.sandbox.helpers import Helper, HelperKilled
from azr_async.adapters.sandbox.inside.wire import NO_FORK, NOTE, REPORT, with_length
from azr_async.adapters.sandbox.pool import KILLED_RUNS, SandboxPool
from azr_async.adapters.sandbox.verdicts import Limits, Report, outcomes_of
from azr_async.errors import SandboxError
from azr_async.messages import Outcome

BUSY = "def f(x):\n    n = 0\n    while n < 10**7: n += 1\n    return x"
HOLDING = "def f(x):\n    held = bytearray(b'x') * ({mb} << 20)\n    while held: pass"
LIMITS = Limits(wall_seconds=1.0, cpu_seconds=10, result_bytes=100, memory_mb=100)


def sandbox(label: str = "", wall_seconds: float = 30.0) -> SandboxPool:
    return SandboxPool(workers=1, wall_seconds=wall_seconds, cpu_seconds=20.0, memory_mb=128, label=label)


def processes(label: str, role: str) -> dict[int, int]:
    """Those of one role, and the clock ticks that each has used."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if {label.encode(), role.encode()} <= set(words):
                fields = (entry / "stat").read_text("utf-8").rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[11])
        except OSError:
            continue
    return found


async def first(pool: SandboxPool, program: str) -> Outcome:
    return (await pool.run(program, ["1"]))[0]


# ---------------------------------------------------------------- killed from outside


@pytest.mark.parametrize(("kills", "status"), [(KILLED_RUNS - 1, "ok"), (KILLED_RUNS, "lost")])
async def test_a_program_that_the_host_kills_is_run_again_and_then_lost(kills: int, status: str) -> None:
    label = f"test-lost-{kills}"
    async with sandbox(label) as pool:
        outcome, _ = await killing_children(label, kills, first(pool, BUSY))
        assert (outcome.status, outcome.limit) == (status, "")
        assert pool.numbers()[f"executions.{status}"] == 1
        assert pool.meter.kills == kills
        assert (await first(pool, BUSY)).status == "ok"
        assert pool.meter.remembered == (status == "ok")  # what was lost is not remembered


async def test_who_is_killed_at_his_limit_of_memory_is_told_so_however_large_the_owner_of_the_pool_is() -> None:
    label = "test-lost-full"
    ballast = bytearray(b"x") * (300 << 20)
    async with sandbox(label) as pool:
        outcome, kills = await killing_children(label, KILLED_RUNS, first(pool, HOLDING.format(mb=121)))
    del ballast
    assert (outcome.status, outcome.limit, kills) == ("memory", "memory", 1)


@pytest.mark.parametrize(("mb", "status"), [(20, "lost"), (90, "memory")])
async def test_who_holds_half_of_his_memory_cannot_have_himself_lost(mb: int, status: str) -> None:
    label = f"test-lost-half-{mb}"
    async with sandbox(label) as pool:
        outcome, kills = await killing_children(label, KILLED_RUNS, first(pool, HOLDING.format(mb=mb)))
    assert (outcome.status, kills) == (status, KILLED_RUNS)


async def test_where_no_process_can_be_had_the_rest_of_a_call_is_lost_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    async def fork(*request: object) -> Report | str:
        nonlocal calls
        calls += 1
        return "its zygote is silent" if calls == 2 else await real_fork(*request)  # type: ignore[arg-type]

    async with sandbox() as pool:
        real_fork = pool._crew.fork
        monkeypatch.setattr(pool._crew, "fork", fork)
        outcomes = await pool.run("def f(x): return 1 if x else [0] * 10**9", ["1", "0", "2", "3"])
    assert calls == 2
    assert [outcome.status for outcome in outcomes] == ["ok", "lost", "lost", "lost"]


async def killing_children(label: str, most: int, work: Awaitable[Outcome]) -> tuple[Outcome, int]:
    """Kill those processes that have computed for long since this began, so that it is the program at work."""
    killed: set[int] = set()
    task = asyncio.ensure_future(work)
    seen = processes(label, "zygote")
    while not task.done():
        await asyncio.sleep(0.003)
        for process, used in processes(label, "zygote").items():
            is_busy = used >= seen.setdefault(process, used) + 5
            if is_busy and process not in killed and len(killed) < most:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                killed.add(process)
    return task.result(), len(killed)


@pytest.mark.parametrize(
    ("number", "frames", "cpu_seconds", "peak_mib", "status", "limit"),
    [
        (signal.SIGKILL, [], 0.1, 40, "lost", ""),
        (signal.SIGKILL, [], 0.1, 60, "memory", "memory"),
        (signal.SIGKILL, [], 0.1, 95, "memory", "memory"),
        (signal.SIGKILL, [], 9.5, 50, "timeout", "cpu"),
        (signal.SIGXCPU, [], 9.5, 50, "timeout", "cpu"),
        (signal.SIGSYS, [], 0.1, 50, "blocked", "calls"),
        (signal.SIGSYS, [NOTE], 0.1, 50, "blocked", "processes"),
        (signal.SIGSEGV, [NOTE], 0.1, 50, "error", ""),
    ],
)
def test_each_way_to_die_has_its_own_verdict(
    number: int, frames: list[bytes], cpu_seconds: float, peak_mib: int, status: str, limit: str
) -> None:
    report = Report(
        content=b"".join(map(with_length, frames)),
        is_over_limit=False,
        was_killed=False,
        wait_status=number,
        cpu_seconds=cpu_seconds,
        peak_kib=peak_mib << 10,
        wall_ms=1.0,
    )
    (outcome,) = outcomes_of(report, 1, LIMITS)
    assert (outcome.status, outcome.limit) == (status, limit)


def test_a_note_is_no_claim() -> None:
    content = b"".join(map(with_length, [b"V1", NOTE, b"V2"]))
    report = Report(
        content=content, is_over_limit=False, was_killed=False, wait_status=0, cpu_seconds=0.0, peak_kib=0, wall_ms=1.0
    )
    outcomes = outcomes_of(report, 2, LIMITS)
    assert [outcome.text for outcome in outcomes] == ["1", "2"]
    assert sum(outcome.wall_ms for outcome in outcomes) == report.wall_ms


async def test_where_no_wall_holds_a_program_it_is_charged_with_its_own_death(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sandbox("test-lost-bare") as pool:
        pool._crew.layers["seccomp"] = "unavailable: as on a host without it"
        outcome, _ = await killing_children("test-lost-bare", KILLED_RUNS, first(pool, BUSY))
    assert (outcome.status, outcome.limit) == ("memory", "memory")


async def test_a_report_of_no_child_is_told_with_its_reason() -> None:
    report = REPORT.pack(NO_FORK, errno.EAGAIN, 0, 0, 0)
    async with sandbox() as pool, pool._crew._lanes[0].member() as slot:
        assert slot._why_not_begun(report, 10, LIMITS) == (
            "no process can be forked (Resource temporarily unavailable)"
        )


@pytest.mark.parametrize("room", [0, 1])
def test_a_host_with_no_room_for_processes_is_told_from_one_that_refuses_layers(room: int) -> None:
    code = (
        "import resource, sys; from azr_async.__main__ import main;"
        f"resource.setrlimit(resource.RLIMIT_NPROC, ({room}, {room}));"
        "sys.exit(main(['execute', '--explain', '--workers', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Lower sandbox.workers" in done.stderr
    assert "kernel" not in done.stderr


# ---------------------------------------------------------------- limits under their names


@pytest.mark.parametrize(
    ("program", "status", "limit"),
    [
        ("import time\ndef f(x): time.sleep(99)", "timeout", "wall"),
        ("def f(x):\n    while True: pass", "timeout", "cpu"),
        ("def f(x): return [0] * 10**9", "memory", "memory"),
        ("import os\ndef f(x): os.fork()", "blocked", "processes"),
        ("import threading\ndef f(x): threading.Thread(target=f).start()", "blocked", "processes"),
        ("import os\ndef f(x): os.system('ls')", "blocked", "processes"),
        ("import os\ndef f(x): os.kill(os.getpid(), 9)", "blocked", "calls"),
        ("import socket\ndef f(x): socket.socket()", "blocked", "calls"),
        ("def f(x): open('/tmp/x', 'w')", "error", "files"),
        ("def f(x): return 'a' * 10**6", "output_too_long", "output"),
        ("def f(x): raise PermissionError('no')", "error", ""),
        ("def f(x): return x", "ok", ""),
    ],
)
async def test_every_limit_has_its_name(program: str, status: str, limit: str) -> None:
    pool = SandboxPool(
        workers=1,
        wall_seconds=0.5 if limit == "wall" else 30.0,
        cpu_seconds=1.0,
        memory_mb=128,
        allowed_imports=["os", "socket", "threading", "time"],
        is_gated=False,
    )
    async with pool:
        outcome = await first(pool, program)
        assert (outcome.status, outcome.limit) == (status, limit)
        assert {name: n for name, n in pool.numbers().items() if name.startswith("limits.")} == (
            {f"limits.{limit}": 1.0} if limit else {}
        )


async def test_a_limit_too_short_to_begin_in_is_a_timeout() -> None:
    async with sandbox(wall_seconds=0.0001) as pool:
        outcomes = [await first(pool, f"def f(x):\n    while True: {number}") for number in range(8)]
        assert {(outcome.status, outcome.limit) for outcome in outcomes} == {("timeout", "wall")}
        assert pool.restarts == 0


# ---------------------------------------------------------------- texts


async def test_large_texts_of_one_call_are_all_read() -> None:
    texts = [f"'{number}{'a' * 60_000}'" for number in range(64)]
    async with sandbox() as pool:
        outcomes = await pool.run("def f(x): return len(x)", texts)
        assert {outcome.status for outcome in outcomes} == {"ok"}
        assert pool.restarts == 0


async def test_a_call_of_several_pieces_fails_as_one_of_a_single_piece_does() -> None:
    pool = sandbox()
    async with pool:
        pass
    with pytest.raises(SandboxError, match="closed"):
        await pool.run("def f(x): return x", [f"'{letter * 50_000}'" for letter in "abc"])


async def test_a_text_that_cannot_be_read_takes_no_other_one_of_its_call_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "REPLY_BYTES", 30_000)  # a parser that answers more is taken to be broken
    texts = ["'a'", f"'{'b' * 20_000}'", f"'{'c' * 40_000}'", "'d'"]
    async with sandbox() as pool:
        outcomes = await pool.run("def f(x): return x[:1]", texts)
        assert [outcome.text or outcome.status for outcome in outcomes] == ["'a'", "'b'", "rejected", "'d'"]
        assert outcomes[2].ran is False


async def test_a_text_whose_parsers_the_host_kills_is_lost_and_not_refused() -> None:
    label = "test-lost-parser"
    async with sandbox(label) as pool:
        lane = pool._crew._parsers
        start = lane._start

        async def start_a_doomed_one() -> parsing.Parser:
            parser = await start()
            doom()
            return parser

        def doom() -> None:
            (process,) = set(processes(label, "parser")) - set(map(parent_of, processes(label, "parser"))) - doomed
            doomed.add(process)
            os.kill(process, signal.SIGSTOP)  # so that it cannot answer before
            asyncio.get_running_loop().call_later(0.05, os.kill, process, signal.SIGKILL)

        doomed: set[int] = set()
        doom()
        lane._start = start_a_doomed_one  # type: ignore[misc]
        outcomes = [await pool.literal("1"), *(await pool.run("def f(x): return x", ["1"]))]
        lane._start = start  # type: ignore[misc]
        assert [outcome.status for outcome in outcomes] == ["lost", "lost"]
        assert len(doomed) > parsing.ATTEMPTS
        doomed |= set(processes(label, "parser"))
        assert (await pool.literal("1")).status == "ok"
        assert (await first(pool, "def f(x): return x")).text == "1"


async def test_a_text_is_lost_if_any_of_its_parsers_was_killed() -> None:
    ends: list[Exception] = [HelperKilled("the parser was killed"), TimeoutError()]

    class Parser:
        async def parse(self, frame: bytes, seconds: float) -> bytes:
            raise ends.pop(0)

        def close(self) -> None: ...

    request = parsing._Request("[]", 1)
    async with sandbox() as pool:
        while ends:
            await pool._crew._desk._send(Parser(), [request])  # type: ignore[arg-type]
    assert request.is_lost


async def test_nobody_is_kept_waiting_for_the_end_of_a_parser_from_which_nobody_wants_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Helper] = []
    monkeypatch.setattr(Helper, "ended_by_kill", asked.append)
    label = "test-lost-idle"
    async with sandbox(label) as pool, asyncio.timeout(20):
        (parser,) = pool._crew._parsers._all
        is_gone, close = asyncio.Event(), parser.close
        monkeypatch.setattr(parser, "close", lambda: (close(), is_gone.set()))
        for process in processes(label, "parser"):
            os.kill(process, signal.SIGKILL)
        await is_gone.wait()
    assert asked == []


def test_a_process_that_has_hung_up_and_is_not_gone_counts_as_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "KILL_SECONDS", 0.01)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        helper = Helper(
            process=process,
            result_fd=-1,
            result_pipe_bytes=0,
            request_fd=-1,
            leftover_fd=-1,
            control_fd=-1,
            report_fd=-1,
            layers={},
            open_fds=[],
        )
        assert helper.ended_by_kill()
        process.kill()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[1])
