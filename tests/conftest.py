"""`async def test_...` runs on uvloop under a deadline; every test leaves its loop empty."""

import asyncio
import inspect

import pytest
import uvloop
from hypothesis import settings

DEADLINE_SECONDS = 60.0

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
