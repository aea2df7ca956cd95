"""The one thread in which a learner's torch works, so that the event loop stays free for heartbeats."""

import asyncio
import faulthandler
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from azr_async.errors import TrainingError

T = TypeVar("T")
Deed = Callable[[], None]

NAME: Final = "torch"


class TorchThread:
    """Does what it is asked for, one after the other.

    A kernel that never ends cannot be interrupted. Its thread is left behind then, and ends with the process.
    """

    def __init__(self) -> None:
        self._deeds: queue.SimpleQueue[Deed | None] = queue.SimpleQueue()
        self._ended: Future[None] = Future()
        self._ended.set_running_or_notify_cancel()  # whoever stops waiting for it does not cancel it
        self._stuck = ""
        threading.Thread(target=self._work, name=NAME, daemon=True).start()

    async def run(self, work: Callable[[], T], *, what: str = "", deadline_seconds: float | None = None) -> T:
        """The result of `work`, done after what was asked before.

        Without a deadline `work` has deadlines of its own. Raises TrainingError naming `what` when it has not ended in
        time; from then on nothing can be done here any more.
        """
        if self._stuck:
            raise TrainingError(self._stuck)
        result: Future[T] = Future()
        self._deeds.put(lambda: _done(result, work))
        try:
            async with asyncio.timeout(deadline_seconds) as limit:
                return await asyncio.wrap_future(result)
        except TimeoutError:
            if not limit.expired():
                raise  # of the work itself
            self._leave_behind(
                f"{what} has not ended within {deadline_seconds:g} s. Its log, or that of another learner rank, tells "
                "where it is. Go on from the last checkpoint; raise learner.step_seconds if it was only slow, else "
                "look after the device."
            )
            raise TrainingError(self._stuck) from None

    async def close(self, within_seconds: float) -> None:
        """Wait for what was asked for, but no longer than that: whoever asked may have gone, and it may never end."""
        self._deeds.put(None)
        if not self._stuck and not (await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=within_seconds))[0]:
            self._leave_behind("torch was still at work when the learner ended.")

    def _leave_behind(self, reason: str) -> None:
        faulthandler.dump_traceback()  # into the log: where it is
        self._stuck = reason

    def _work(self) -> None:
        while (deed := self._deeds.get()) is not None:
            deed()
        self._ended.set_result(None)


@asynccontextmanager
async def torch_thread(end_seconds: float) -> AsyncIterator[TorchThread]:
    """Ends with the block, or is left behind so long after it."""
    thread = TorchThread()
    try:
        yield thread
    finally:
        await thread.close(end_seconds)


def end_of_process(status: int) -> int:
    """The exit status to return. Does not return where torch was left behind: the interpreter would wait for it."""
    if any(thread.name == NAME for thread in threading.enumerate()):
        logging.shutdown()
        os._exit(status)
    return status


def _done(result: "Future[T]", work: Callable[[], T]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(work())
    except BaseException as problem:  # whoever asked for it has to hear of it
        result.set_exception(problem)
