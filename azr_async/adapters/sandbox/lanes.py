"""Interchangeable sandboxed processes: started when needed, used one request at a time, replaced when broken."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Generic, Protocol, TypeVar

from azr_async.adapters.sandbox.helpers import Helper
from azr_async.errors import SandboxError


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
        self._idle: list[MemberT] = []
        self._all: set[MemberT] = set()
        self._is_closed = False

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

    @asynccontextmanager
    async def member(self) -> AsyncIterator[MemberT]:
        """Have a process to oneself. Waits while all are busy, which ends because every request has a deadline."""
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

    async def _add(self) -> None:
        self._idle.append(await self._new())

    async def _take(self) -> MemberT:
        while self._idle:
            member = self._idle.pop()
            if not member.is_broken:
                return member
            self._all.discard(member)
            self.restarts += 1
        return await self._new()

    async def _new(self) -> MemberT:
        if self._is_closed:
            raise SandboxError("the sandbox is closed. Run programs only inside its `async with` block.")
        member = await self._start()
        self._all.add(member)
        if self._is_closed:
            member.close()
            raise SandboxError("the sandbox was closed while a program waited for it.")
        return member
