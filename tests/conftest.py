"""`async def test_...` runs on uvloop under a deadline, every test leaves its loop empty, and whole runs are ended."""

import asyncio
import inspect
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 60.0

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script. Programs inherit what is ignored, and some tests interrupt theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("steady", deadline=None)  # the first call into a library takes its time
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test; other tests are left to pytest."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def run() -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await pyfuncitem.obj(**arguments)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"the test left tasks behind: {left}"

    uvloop.run(run())
    return True


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts runs, and ends what a failed test has left of them; their programs die with their launcher."""
    started: list[subprocess.Popen[str]] = []

    def start_run(*options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "run.py", *options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start_run
    for process in started:
        process.kill()
        process.communicate()
