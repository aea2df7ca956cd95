"""Limits belong to one input, verdicts to one text, and trouble with processes to nobody."""

import asyncio
import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from azr_async.adapters.sandbox import lanes
from azr_async.adapters.sandbox.crew import FLAVOURS
from azr_async.adapters.sandbox.helpers import _hint
from azr_async.adapters.sandbox.inside.bombs import COMPILED_NODES
from azr_async.adapters.sandbox.inside.parser import _part
from azr_async.adapters.sandbox.inside.wire import with_length
from azr_async.adapters.sandbox.parsing import _parts_of, _Request
from azr_async.adapters.sandbox.pool import DEFAULT_IMPORTS, DOUBTFUL_RUNS, SandboxPool
from azr_async.adapters.sandbox.verdicts import Limits, Report, agreed, lost, outcomes_of
from azr_async.errors import SandboxError
from azr_async.messages import Outcome

ENDLESS = "def f(x):\n    while True: pass\n"
WITH_TIME = (*DEFAULT_IMPORTS, "time")


def sandbox(wall_seconds: float = 10.0, label: str = "", memory_mb: int = 128) -> SandboxPool:
    return SandboxPool(
        workers=1,
        wall_seconds=wall_seconds,
        cpu_seconds=1.0,
        memory_mb=memory_mb,
        allowed_imports=WITH_TIME,
        label=label,
    )


def processes_labelled(label: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and label.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(entry.name)
        except OSError:
            continue
    return found


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Nothing can be opened in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # those that are open stay so
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ---------------------------------------------------------------- limits of one input


async def test_wall_time_is_counted_for_each_input() -> None:
    async with sandbox(wall_seconds=2.0) as pool:
        outcomes = await pool.run("import time\ndef f(x):\n    time.sleep(0.8)\n    return x", list("1234"))
    assert [outcome.status for outcome in outcomes] == ["ok"] * 4


async def test_cpu_time_is_counted_for_each_input() -> None:
    program = "import time\ndef f(x):\n    end = time.process_time() + 0.7\n    while time.process_time() < end: pass"
    async with sandbox() as pool:
        outcomes = await pool.run(program, list("1234"))
    assert [outcome.status for outcome in outcomes] == ["ok"] * 4


async def test_memory_is_counted_for_each_input() -> None:
    program = "import math\ndef f(x):\n    math.kept = [bytearray(90 << 20), getattr(math, 'kept', None)]\n    return x"
    async with sandbox() as pool:
        outcomes = await pool.run(program, list("123"))
        (greedy,) = await pool.run("def f(x):\n    return bytearray(200 << 20)", ["1"])
    assert [outcome.status for outcome in outcomes] == ["ok"] * 3
    assert greedy.status == "memory"


async def test_an_input_that_runs_into_its_limit_is_found_wherever_it_stands() -> None:
    program = "import time\ndef f(x):\n    time.sleep(x)\n    return x"
    async with sandbox(wall_seconds=2.0) as pool:
        outcomes = await pool.run(program, ["1.1", "1.0", "100", "0"])
    assert [outcome.status for outcome in outcomes] == ["ok", "ok", "timeout", "timeout"]
    assert outcomes[2].error == "wall time"
    assert "not tried" in outcomes[3].error


FRAMES = [b'V"a"', b"M", b'V"c"']


@pytest.mark.parametrize(
    ("frames", "was_killed", "wait_status", "expected"),
    [
        (FRAMES[:1], False, 0, ["ok"]),
        (FRAMES, False, 0, ["ok"]),  # the second is to be tried first in a child of its own
        (FRAMES[1:], False, 0, ["memory", "ok"]),
        (FRAMES[:1] * 2, True, 9, ["ok", "ok"]),
        (FRAMES[:1] * 3, True, 9, ["ok", "ok"]),  # the last says what it likes: its process did not end by itself
        (FRAMES[:1] * 9, False, 0, ["ok", "ok"]),
        ([], True, 9, ["timeout"]),
        ([], False, 31, ["blocked"]),
    ],
)
def test_a_claim_counts_up_to_the_input_at_which_the_process_ended(
    frames: list[bytes], was_killed: bool, wait_status: int, expected: list[str]
) -> None:
    report = Report(
        content=b"".join(map(with_length, frames)),
        is_over_limit=False,
        was_killed=was_killed,
        wait_status=wait_status,
        cpu_seconds=0.0,
        peak_kib=0,
        wall_ms=1.0,
    )
    count = len(frames) if len(frames) in (1, 2) and not was_killed else 3
    outcomes = outcomes_of(report, count, Limits(wall_seconds=1.0, cpu_seconds=1, result_bytes=100, memory_mb=128))
    assert [outcome.status for outcome in outcomes] == expected
    assert report.was_forced == (was_killed or wait_status != 0)


# ---------------------------------------------------------------- one text spoils no other


async def test_an_input_that_is_too_long_is_refused_by_itself() -> None:
    program, long_text = "def f(x): return len(str(x))", f"'{'a' * 70_000}'"
    async with sandbox() as pool:
        first = await pool.run(program, [long_text, "1"])
        second = await pool.run(program, ["12", long_text])
    assert [outcome.status for outcome in first] == ["rejected", "ok"]
    assert [outcome.status for outcome in second] == ["ok", "rejected"]
    assert "65536" in first[0].error


async def test_what_could_not_be_read_this_time_is_read_again() -> None:
    program = "def f(x): return " + "-" * 60_000 + "1"
    async with sandbox() as pool:
        for _ in range(2):
            (outcome,) = await pool.run(program, ["1"])
            assert (outcome.status, outcome.ran) == ("rejected", False)
            assert (await pool.literal("-" * 60_000 + "1")).status == "rejected"
        assert pool.meter.remembered == 0


def test_a_reader_that_fails_says_so_for_its_text_only() -> None:
    def fail(text: str, allowed: object) -> bytes:
        raise ImportError("unicodedata")

    assert _part(fail, "x", None) == b"Uthe reader failed: ImportError"
    assert _part(lambda text, allowed: b"A" * (1 << 19), "x", None)[:1] == b"E"


@pytest.mark.parametrize("reply", [b"", b"\1", b"\5\0\0\0C", with_length(with_length(b"C")), with_length(b"\1")])
def test_an_answer_of_another_form_is_no_answer(reply: bytes) -> None:
    with pytest.raises(ValueError, match="part"):
        _parts_of(reply, [_Request("[]", parts=2)])


def test_a_run_whose_process_died_says_nothing_about_the_program() -> None:
    ok = Outcome(status="ok", value="1")
    gone = lost("its zygote has ended")
    assert agreed(gone, ok) == agreed(ok, gone) == gone
    assert gone.status == "lost"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ("__match_args__ = ('x',)", "ok"),
        ("__match_args__: tuple[str, ...] = ('x',)", "ok"),
        ("__match_args__: tuple[str, ...] = ('__' + 'x',)", "rejected"),
        ("__match_args__: tuple[str, ...] = ('__dict__',)", "rejected"),
        ("__match_args__: tuple[str, ...]", "rejected"),
        ("__globals__: object = 1", "rejected"),
        ("__globals__: object", "rejected"),
        ("y: int = 1", "error"),
    ],
)
async def test_what_a_pattern_looks_up_has_to_be_written_out(fields: str, status: str) -> None:
    program = f"class P:\n    x = 7\n    {fields}\ndef f(x):\n    match P():\n        case P(found): return found"
    async with sandbox() as pool:
        (outcome,) = await pool.run(program, ["1"])
    assert outcome.status == status, outcome


async def test_parse_bombs_are_refused_before_they_are_compiled() -> None:
    bomb = (
        "def f(x):\n"
        + "".join(f"{' ' * depth}try: return 1\n{' ' * depth}finally:\n" for depth in range(1, 14))
        + " " * 14
        + "x\n"
    )
    async with sandbox() as pool:
        started = time.process_time()
        async with asyncio.TaskGroup() as group:
            bombs = [group.create_task(pool.run(bomb * 40 + f"# {number}", ["1"])) for number in range(4)]
            others = [group.create_task(pool.run(f"def f(x): return {number}", ["1"])) for number in range(20)]
        assert {task.result()[0].status for task in bombs} == {"rejected"}
        assert "finally" in bombs[0].result()[0].error
        assert {task.result()[0].status for task in others} == {"ok"}
        assert pool.restarts == 0
        assert time.process_time() - started < 5.0


async def test_a_text_that_holds_a_parser_up_holds_up_no_other() -> None:
    async with sandbox(label="test-held-up") as pool:
        (parser,) = [process for process in processes_labelled("test-held-up") if is_parser(process)][-1:]
        os.kill(int(parser), signal.SIGSTOP)  # as a text would, if there were one that is parsed for ever
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(pool.run(f"def f(x): return {number}", ["1"])) for number in range(40)]
        assert [task.result()[0].text for task in runs] == [str(number) for number in range(40)]
        assert pool.restarts == 1


def is_parser(process: str) -> bool:
    return b"parser" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")


async def test_ordinary_finally_blocks_are_no_bombs() -> None:
    program = "def f(x):\n" + "".join(
        f"    try:\n        x += {n}\n        if x > 10**9: return 0\n    finally:\n        x += 1\n"
        for n in range(500)
    )
    assert COMPILED_NODES > 500 * 20
    async with sandbox() as pool:
        (outcome,) = await pool.run(f"{program}    return x", ["0"])
    assert outcome.text == str(sum(range(500)) + 500)


# ---------------------------------------------------------------- seeds


async def test_a_dependence_between_two_outcomes_is_nearly_always_found() -> None:
    programs = [f"def f(x): return hash('{number}') % 2" for number in range(40)]
    programs += [f"def f(x): return list({{'a{number}', 'b{number}'}})" for number in range(40)]
    async with sandbox() as pool:
        outcomes = [(await pool.run(program, ["1"], times=2))[0].status for program in programs]
    # Each is missed one time in 16: 5 of 80. More than 20 would be seen once in 10**7 times.
    assert outcomes.count("nondeterministic") >= 60


async def test_only_doubtful_programs_are_run_more_than_twice() -> None:
    ordinary = ["def f(x): return [x]", "def f(x): return {x: 1}, x - 1", "def f(x):\n  settle = x\n  return settle"]
    doubtful = [
        "def f(x): return len({x, 2})",
        "def f(x): return sorted({i for i in (1, x)})",
        "def f(x): return len(set([x]))",
        "def f(x): return ({1: 2}.keys() & {x: 3}.keys()) and 0",
        "import time\ndef f(x): return x",
    ]
    async with sandbox() as pool:
        for program, runs in [*((each, 2) for each in ordinary), *((each, DOUBTFUL_RUNS) for each in doubtful)]:
            before = pool.meter.forks
            (outcome,) = await pool.run(program, ["1"], times=2)
            assert (outcome.status, pool.meter.forks - before) == ("ok", runs), program
        before = pool.meter.forks
        await pool.run(ordinary[0], ["{1, 2}", "3"], times=2)
        assert pool.meter.forks - before == DOUBTFUL_RUNS
        assert DOUBTFUL_RUNS == FLAVOURS


async def test_each_of_several_runs_has_another_seed_and_another_clock() -> None:
    program = "import time\ndef f(x): return [hash('a') % 10**9, int(time.time()) // 86400]"
    async with sandbox() as pool:
        code, arguments = await pool._read(program, b"", ["1"], "literal")
        values = {(await pool._execute(run, code[1:], arguments))[0].text for run in range(FLAVOURS)}
    assert len(values) == FLAVOURS


@pytest.mark.parametrize("start", ["os.fork()", "os.system('true')", "_thread.start_new_thread(print, ())"])
async def test_behind_the_gate_too_who_starts_a_process_is_told_so(start: str) -> None:
    pool = SandboxPool(workers=1, allowed_imports=("os", "_thread"))
    async with pool:
        (outcome,) = await pool.run(f"import os, _thread\ndef f(x):\n    return {start}", ["1"])
    assert (outcome.status, outcome.limit) == ("blocked", "processes")


async def test_the_environment_is_empty_of_the_hash_seed_too() -> None:
    async with SandboxPool(workers=1, allowed_imports=("os",)) as pool:
        (outcome,) = await pool.run("import os\ndef f(x):\n    return dict(os.environ)", ["1"], times=2)
    assert (outcome.status, outcome.text) == ("ok", "{}")


# ---------------------------------------------------------------- processes that do not start


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 30, 100, 300])
async def test_a_start_that_is_cancelled_leaves_nothing(turns: int) -> None:
    descriptors, label = len(os.listdir("/proc/self/fd")), f"test-cancelled-start-{turns}"
    pool = sandbox(label=label)
    start = asyncio.ensure_future(pool.__aenter__())
    for _ in range(turns):
        await asyncio.sleep(0.001)
    if start.done():
        assert turns >= 100, "nothing starts that fast"
        await pool.__aexit__(None, None, None)
    else:
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    assert processes_labelled(label) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_where_no_spare_can_start_programs_wait_for_an_idle_process() -> None:
    async with sandbox(wall_seconds=2.0) as pool:
        await pool.run("def f(x): return x", ["1"], times=2)
        with no_more_descriptors():
            async with asyncio.TaskGroup() as group:
                endless = [group.create_task(pool.run(f"{ENDLESS}#{n}", ["1"])) for n in range(2)]
                quick = [group.create_task(pool.run(f"def f(x): return {n}", ["1"], times=2)) for n in range(5)]
    assert {task.result()[0].status for task in endless} == {"timeout"}
    assert {task.result()[0].status for task in quick} == {"ok"}


async def test_where_none_is_left_and_none_can_start_it_is_told_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "START_AGAIN_SECONDS", 0.01)
    async with sandbox(label="test-none-left") as pool:
        for process in processes_labelled("test-none-left"):
            os.kill(int(process), signal.SIGKILL)
        with no_more_descriptors(), pytest.raises(SandboxError, match=r"open files.*ulimit"):
            await pool.run("def f(x): return x", ["1"])
        assert (await pool.run("def f(x): return x", ["1"]))[0].status == "ok"


# ---------------------------------------------------------------- numbers


async def test_every_forced_end_is_counted_and_only_what_ran_has_a_latency() -> None:
    async with sandbox(wall_seconds=4.0) as pool:
        await pool.run("import os", ["1"])
        await pool.run("def f(x): return x", ["y"])
        assert pool.meter.latency_ms(50) == {}
        await pool.run(ENDLESS, ["1"])  # its CPU limit comes first
        await pool.run("import time\ndef f(x): time.sleep(100)", ["1"])
        assert pool.numbers()["kills"] == 2
        assert pool.meter.latency_ms(50)[50] > 500


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EMFILE, "ulimit -n"), (errno.EAGAIN, "processes or the memory"), (errno.EACCES, "execute /")],
)
def test_a_process_that_cannot_start_gets_the_advice_that_helps(number: int, advice: str) -> None:
    assert advice in _hint("zygote", OSError(number, os.strerror(number)))
