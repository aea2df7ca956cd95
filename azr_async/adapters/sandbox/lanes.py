"""Interchangeable sandboxed processes: started when needed, used one request at a time, replaced when broken."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Generic, Protocol, TypeVar

from azr_async.adapters.sandbox.helpers import Helper, StartFailed
from azr_async.errors import SandboxError

START_ATTEMPTS: Final = 20
START_AGAIN_SECONDS: Final = 0.5


class Member(Protocol):
    """One process of a lane."""

    helper: Helper
    is_broken: bool

    def close(self) -> None: ...


MemberT = TypeVar("MemberT", bound=Member)


class Lane(Generic[MemberT]):
    """At most `most` processes of one kind."""

    def __init__(self, start: Callable[[], Awaitable[MemberT]], *, most: int) -> None:
        self.restarts = 0
        self._start: Final = start
        self._room = asyncio.Semaphore(most)
        self._idle: deque[MemberT] = deque()
        """The one that has rested longest comes first: it is ready, where others still fork their next child."""
        self._all: set[MemberT] = set()
        self._is_closed = False
        self._given_back = asyncio.Event()

    def open(self, starts: asyncio.TaskGroup, count: int) -> None:
        """Start the first `count` processes as tasks of the group `starts`."""
        for _ in range(count):
            starts.create_task(self._add())

    def close(self) -> None:
        """Kill every process; whoever uses one is told."""
        self._is_closed = True
        for member in self._all:
            member.helper.strike()
        for member in tuple(self._all):
            member.close()
        self._all.clear()
        self._idle.clear()
        self._given_back.set()

    @asynccontextmanager
    async def member(self) -> AsyncIterator[MemberT]:
        """Have a process to oneself. Waits while all are busy, which ends because every request has a deadline.

        Raises SandboxError when none is left and none can be started for `START_ATTEMPTS * START_AGAIN_SECONDS`.
        """
        async with self._room:
            member = await self._take()
            try:
                yield member
            finally:
                if member.is_broken:
                    self._all.discard(member)
                    self.restarts += 1
                elif not self._is_closed:
                    self._idle.append(member)
                    self._given_back.set()

    async def _add(self) -> None:
        self._idle.append(await self._new())

    async def _take(self) -> MemberT:
        """An idle process or a new one; where none can be started, one that comes back, or a new one a little later."""
        failures = 0
        while True:
            member = self._take_idle()
            if member is not None:
                return member
            try:
                return await self._new()
            except StartFailed:
                failures += not self._all
                if failures >= START_ATTEMPTS:
                    raise
            self._given_back.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(START_AGAIN_SECONDS):
                    await self._given_back.wait()

    def _take_idle(self) -> MemberT | None:
        while self._idle:
            member = self._idle.popleft()
            if not member.is_broken:
                return member
            self._all.discard(member)
            self.restarts += 1
        return None

    async def _new(self) -> MemberT:
        if self._is_closed:
            raise SandboxError("the sandbox is closed. Run programs only inside its `async with` block.")
        member = await self._start()
        self._all.add(member)
        if self._is_closed:
            member.close()
            raise SandboxError("the sandbox was closed while a program waited for it.")
        return member
