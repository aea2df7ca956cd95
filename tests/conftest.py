"""`async def test_...` runs on uvloop under a deadline, every test leaves its loop empty, and whole runs are ended."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
WHOLE_RUNS = frozenset(
    f"tests/{name}.py"
    for name in (
        "adapters/test_engine_vllm",
        "faults/test_fault_runs",
        "test_end_to_end",
        "test_end_to_end_auto",
        "test_end_to_end_vllm",
        "test_resume",
        "test_supervision",
    )
)
"""Files whose tests keep two cores busy by themselves: several processes that compute, or vLLM."""
DEADLINE_SECONDS = 60.0

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes test at once, and torch's threads spin while they wait

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script. Programs inherit what is ignored, and some tests interrupt theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("steady", deadline=None)  # the first call into a library takes its time
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A socket's path has room for 100 bytes: call the folder of one of several processes `1`, not `popen-gw1`."""
    if hasattr(config, "workerinput"):
        folder = Path(config.option.basetemp)
        config.option.basetemp = str(folder.parent / folder.name.removeprefix("popen-gw"))


def scope_of(nodeid: str) -> str:
    """Two processes test at once, file by file. `WHOLE_RUNS` take turns in one of them."""
    file = nodeid.partition("::")[0]
    return "whole runs" if file in WHOLE_RUNS else file


class ByFile(LoadScopeScheduling):
    """Tests of one scope stay in one process."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    """Who tests what."""
    return ByFile(config, log)


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
