"""The one thread in which a learner's torch works, so that the event loop stays free for heartbeats."""

import asyncio
import faulthandler
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TypeVar

from azr_async.errors import TrainingError

T = TypeVar("T")
Deed = Callable[[], None]


class TorchThread:
    """Does what it is asked for, one after the other.

    A kernel that never ends cannot be interrupted. Its thread is left behind then, and ends with the process.
    """

    def __init__(self) -> None:
        self._deeds: queue.SimpleQueue[Deed | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="torch", daemon=True)
        self._thread.start()
        self._stuck = ""

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
            faulthandler.dump_traceback()  # into the log: where it is
            self._stuck = (
                f"{what} has not ended within {deadline_seconds:g} s. Its log tells where it is. Go on from the last "
                "checkpoint; raise learner.step_seconds if it was only slow, else look after the device."
            )
            raise TrainingError(self._stuck) from None

    async def close(self) -> None:
        """Wait for what was asked for, unless that never ends."""
        self._deeds.put(None)
        if not self._stuck:
            await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (deed := self._deeds.get()) is not None:
            deed()


@asynccontextmanager
async def torch_thread() -> AsyncIterator[TorchThread]:
    """Ends with the block."""
    thread = TorchThread()
    try:
        yield thread
    finally:
        await thread.close()


def _done(result: "Future[T]", work: Callable[[], T]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(work())
    except BaseException as problem:  # whoever asked for it has to hear of it
        result.set_exception(problem)
