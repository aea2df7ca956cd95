"""Children are forked before their request comes: they get nobody else's, and their own death is no verdict."""

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from azr_async.adapters.sandbox import helpers
from azr_async.adapters.sandbox.helpers import HelperSettings, StartFailed, start_helper
from azr_async.adapters.sandbox.pool import DEFAULT_IMPORTS, SandboxPool


def sandbox(label: str, wall_seconds: float = 10.0, workers: int = 1) -> SandboxPool:
    return SandboxPool(workers=workers, wall_seconds=wall_seconds, cpu_seconds=1.0, memory_mb=128, label=label)


def family(label: str) -> dict[int, int]:
    """Every process with `label` in its command line, and its parent."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and label.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found[int(entry.name)] = int((entry / "stat").read_text("utf-8").rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def is_zygote(process: int) -> bool:
    try:
        return b"zygote" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def waiting(label: str) -> set[int]:
    """The children of zygotes: with nothing below them, and a zygote above."""
    parents = family(label)
    return {process for process in parents if is_zygote(process) and process not in parents.values()}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does and does not tell."""
    while not condition():  # noqa: ASYNC110 - there is nothing to be woken by
        await asyncio.sleep(0.005)


@contextmanager
def all_low_descriptors_taken() -> Iterator[None]:
    """Whatever is opened inside gets a number beyond 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(4096, before[0]), max(4096, before[1])))
    null = os.open(os.devnull, os.O_RDONLY)
    taken = [null]
    try:
        while taken[-1] < 1100:
            taken.append(os.dup(null))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_every_zygote_has_one_child_waiting_and_none_outlives_the_pool() -> None:
    async with sandbox("test-ahead-one", workers=2) as pool:
        await pool.run("def f(x): return x", ["1"])
        await until(lambda: len(waiting("test-ahead-one")) == 4)  # one worker's spare, and the other flavour's zygote
    assert family("test-ahead-one") == {}


async def test_the_death_of_a_waiting_child_is_nobodys_verdict() -> None:
    big = [f"'{number}{'a' * 60_000}'" for number in range(40)]  # more than the pipe of requests holds
    async with sandbox("test-ahead-dead") as pool:
        for inputs in (["1"], big):
            for child in waiting("test-ahead-dead"):
                os.kill(child, signal.SIGKILL)
            outcomes = await pool.run("def f(x): return len(str(x))", inputs, times=2)
            assert {outcome.status for outcome in outcomes} == {"ok"}
        assert pool.meter.kills == 0


async def test_though_many_waiting_children_die_at_once_no_run_is_lost() -> None:
    label = "test-ahead-many"
    async with sandbox(label) as pool:
        async with asyncio.TaskGroup() as group:  # each on a zygote of its own, since each takes long
            for number in range(5):
                group.create_task(pool.run(f"def f(x):\n    while True: {number}", ["1"]))
        await pool.run("def f(x): return x", ["1"])
        zygotes = len(waiting(label))
        for child in waiting(label):
            os.kill(child, signal.SIGKILL)
        (outcome,) = await pool.run("def f(x): return -x", ["1"])
        assert (outcome.text, zygotes > 2) == ("-1", True)


async def test_a_child_that_never_came_to_read_its_program_is_no_timeout_of_it() -> None:
    async with sandbox("test-ahead-stopped", wall_seconds=0.5) as pool:
        await until(lambda: len(waiting("test-ahead-stopped")) == 3)
        for child in waiting("test-ahead-stopped"):
            os.kill(child, signal.SIGSTOP)
        (outcome,) = await pool.run("def f(x): return x", ["1"])
        assert (outcome.status, outcome.text) == ("ok", "1")
        assert pool.restarts == 2


async def test_a_request_that_was_not_read_to_its_end_reaches_no_later_child() -> None:
    """The zygote kills a child that has read half; what is left must be gone before the next child looks."""
    big = [f"'{number}{'a' * 60_000}'" for number in range(40)]
    async with sandbox("test-ahead-half", wall_seconds=0.3) as pool:
        await pool.run("def f(x): return x", ["1"])
        for number in range(6):
            run = asyncio.ensure_future(pool.run(f"def f(x): return {number}", big))
            await asyncio.sleep(0.002 * number)
            for child in waiting("test-ahead-half"):
                os.kill(child, signal.SIGKILL)
            await run
            (outcome,) = await pool.run(f"def f(x): return x, {number}", ["'next'"])
            assert outcome.text == f"('next', {number})"


async def test_a_waiting_child_dies_with_its_zygote() -> None:
    async with sandbox("test-ahead-orphan") as pool:
        await until(lambda: len(waiting("test-ahead-orphan")) == 3)
        parents, children = family("test-ahead-orphan"), waiting("test-ahead-orphan")
        for child in children:
            os.kill(parents[child], signal.SIGKILL)
        await until(lambda: not children & set(family("test-ahead-orphan")))
        assert (await pool.run("def f(x): return x", ["1"], times=2))[0].text == "1"


async def test_killed_zygotes_and_parsers_lose_nothing_in_a_stream_of_programs() -> None:
    async with sandbox("test-ahead-stream", workers=2) as pool:
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(pool.run(f"def f(x): return {n}", ["1"], times=2)) for n in range(200)]
            for _ in range(5):
                done = sum(run.done() for run in runs)
                await until(lambda: sum(run.done() for run in runs) > done)  # noqa: B023 - awaited at once
                helpers_now = sorted(set(family("test-ahead-stream")) - waiting("test-ahead-stream"))
                for process in helpers_now[:: max(1, len(helpers_now) // 3)]:
                    with suppress(ProcessLookupError):  # it has gone down with another one
                        os.kill(process, signal.SIGKILL)
        assert [run.result()[0].text for run in runs] == [str(number) for number in range(200)]
        assert pool.restarts >= 5
    assert family("test-ahead-stream") == {}


async def test_a_process_that_ends_before_it_is_ready_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "_BOOTSTRAP", "raise SystemExit(3)")
    settings = HelperSettings(
        allowed_imports=DEFAULT_IMPORTS, memory_mb=128, cpu_seconds=1, result_bytes=100, is_gated=True, label=""
    )
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StartFailed, match="ended before it was ready"):
            await start_helper("zygote", settings)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_descriptors_of_any_number_will_do() -> None:
    with all_low_descriptors_taken():
        async with sandbox("test-ahead-high") as pool:
            assert (await pool.run("def f(x):\n    while True: pass", ["1"]))[0].status == "timeout"
            assert (await pool.run("def f(x): return x", ["1"]))[0].text == "1"
