"""The learner's thread for torch: one deed after the other, and an error with a name when one never ends."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from azr_async.errors import TrainingError
from azr_async.programs.torch_thread import torch_thread

ROOT = Path(__file__).parents[2]
END_SECONDS = 30.0


async def test_deeds_are_done_in_their_order_in_one_thread() -> None:
    seen = list[tuple[int, str]]()
    async with torch_thread(END_SECONDS) as torch:
        await asyncio.gather(
            *(torch.run(lambda n=n: seen.append((n, threading.current_thread().name))) for n in range(5))
        )
    assert seen == [(n, "torch") for n in range(5)]


async def test_what_a_deed_raises_comes_to_whoever_asked_for_it() -> None:
    def fail() -> None:
        raise TimeoutError("of a collective")

    async with torch_thread(END_SECONDS) as torch:
        with pytest.raises(TimeoutError, match="of a collective"):
            await torch.run(fail, what="a step", deadline_seconds=30.0)
        assert await torch.run(lambda: 7) == 7


async def test_one_that_never_ends_is_named_and_does_not_hold_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    free = threading.Event()

    def a_kernel_that_hangs() -> bool:
        return free.wait()

    async with torch_thread(END_SECONDS) as torch:
        with pytest.raises(TrainingError, match=r"training step 12 has not ended within 0\.05 s\. Its log"):
            await torch.run(a_kernel_that_hangs, what="learner-0's training step 12", deadline_seconds=0.05)
        with pytest.raises(TrainingError, match="training step 12"):
            await torch.run(lambda: 7)
    assert "in a_kernel_that_hangs" in capfd.readouterr().err
    free.set()


async def test_the_end_of_the_block_waits_for_what_was_asked_for() -> None:
    began, free, done = threading.Event(), threading.Event(), list[int]()

    def slow() -> None:
        began.set()
        free.wait()
        done.append(1)

    async with torch_thread(END_SECONDS) as torch:
        asked = asyncio.create_task(torch.run(slow))
        await asyncio.to_thread(began.wait)
        asked.cancel()
        asyncio.get_running_loop().call_later(0.05, free.set)
    assert done == [1]
    assert asked.cancelled()


async def test_a_deed_that_never_ends_is_left_behind_though_nobody_waits_for_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    began, free = threading.Event(), threading.Event()

    def a_kernel_that_hangs() -> None:
        began.set()
        free.wait()

    async with torch_thread(0.05) as torch:
        asked = asyncio.create_task(torch.run(a_kernel_that_hangs, what="a step", deadline_seconds=30.0))
        await asyncio.to_thread(began.wait)
        asked.cancel()
    assert "in a_kernel_that_hangs" in capfd.readouterr().err
    free.set()


PROCESS = """
import asyncio, sys, time
from azr_async.errors import TrainingError
from azr_async.programs.torch_thread import end_of_process, torch_thread

async def main():
    async with torch_thread(30.0) as torch:
        await torch.run(lambda: time.sleep(600), what="a step", deadline_seconds=0.05)

try:
    asyncio.run(main())
except TrainingError as error:
    print(error, flush=True)
    sys.exit(end_of_process(1))
"""


def test_a_process_ends_with_its_status_although_torch_never_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], cwd=ROOT, capture_output=True, text=True, timeout=50.0, check=False
    )
    assert (done.returncode, done.stdout[:20]) == (1, "a step has not ended")
