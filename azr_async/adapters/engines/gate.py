"""How many samples an engine has at a time, and which of those that wait comes next."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets at most `slots` in, the lowest (priority, job) first; shut, it lets nobody in.

    vLLM would queue them itself, but it never takes a running sequence out for a more urgent one: canaries would wait
    for a sample to end. And what it queues has to say beforehand under which weights its cached prompt may be.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._is_shut = False
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._tickets = itertools.count()

    @asynccontextmanager
    async def admitted(self, priority: int, job_id: int) -> AsyncIterator[None]:
        """Wait for one's turn, and have a slot inside of the block."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, job_id, next(self._tickets), turn))
        self._let_in()
        try:
            await turn
            yield
        finally:
            self._free += turn.done() and not turn.cancelled()
            turn.cancel()
            self._let_in()

    def shut(self) -> None:
        """Let nobody in until `open`."""
        self._is_shut = True

    def open(self) -> None:
        """Let in who waits."""
        self._is_shut = False
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._free and not self._is_shut:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                self._free -= 1
