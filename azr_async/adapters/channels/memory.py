"""Channels between stages of one process: a bounded buffer, nothing is encoded.

    problems_in, problems_out = memory_channel("problems", capacity=32, deadline_seconds=600.0)

A send or a receive that is cancelled has had no effect: the message is in the buffer or it never was.
"""

import asyncio
from collections import deque
from typing import Generic, Self, TypeVar

from azr_async.errors import ChannelClosed, ConfigError, PeerVanished

T = TypeVar("T")


def memory_channel(
    name: str, capacity: int, *, deadline_seconds: float | None
) -> tuple["MemorySender[T]", "MemoryReceiver[T]"]:
    """Both ends of a channel.

    Args:
        name: what errors call it.
        capacity: messages that may wait in it; a further `send` waits.
        deadline_seconds: longest time in which nothing moves while somebody waits; then the waiting end raises
            `PeerVanished`. None: no deadline.
    """
    if capacity < 1:
        raise ConfigError(f"channel {name} has room for {capacity} messages. Give it a capacity of at least 1.")
    buffer: _Buffer[T] = _Buffer(name, capacity, deadline_seconds)
    return MemorySender(buffer), MemoryReceiver(buffer)


class MemorySender(Generic[T]):
    """One of the sending ends. The channel ends when all of them, clones included, have left their `async with`."""

    def __init__(self, buffer: "_Buffer[T]") -> None:
        self._buffer = buffer
        self._is_open = True
        buffer.senders += 1

    def clone(self) -> "MemorySender[T]":
        """Another sending end. It counts as open from now on, so it must be entered and left as well."""
        self._check_open()
        return MemorySender(self._buffer)

    async def send(self, message: T) -> None:
        """Put in order; waits while the channel is full. Raises ChannelClosed, PeerVanished."""
        self._check_open()
        await self._buffer.put(message)

    async def ended(self) -> ChannelClosed:
        """Wait until the receiver has left."""
        await self._buffer.receiver_gone.wait()
        return self._buffer.refusal()

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._is_open:
            self._is_open = False
            self._buffer.sender_left()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ChannelClosed(f"this end of channel {self._buffer.name} was closed. Send inside its `async with`.")


class MemoryReceiver(Generic[T]):
    """The receiving end. Several tasks may iterate over it; each message goes to one of them."""

    def __init__(self, buffer: "_Buffer[T]") -> None:
        self._buffer = buffer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """The next message; StopAsyncIteration when every sender has closed and all was delivered."""
        return await self._buffer.take()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._buffer.receiver_left()


class _Buffer(Generic[T]):
    """What both ends share. Each side waits in a queue of its own: the lock's holder waits for the event."""

    def __init__(self, name: str, capacity: int, deadline_seconds: float | None) -> None:
        self.name = name
        self.senders = 0
        self.receiver_gone = asyncio.Event()
        self._capacity = capacity
        self._deadline_seconds = deadline_seconds
        self._messages: deque[T] = deque()
        self._send_turn, self._take_turn = asyncio.Lock(), asyncio.Lock()
        self._room, self._arrival = asyncio.Event(), asyncio.Event()

    async def put(self, message: T) -> None:
        async with self._send_turn:
            while not self.receiver_gone.is_set() and len(self._messages) >= self._capacity:
                await self._wait(self._room, "full, and its receiver took nothing")
            if self.receiver_gone.is_set():
                raise self.refusal()
            self._messages.append(message)
            self._arrival.set()

    async def take(self) -> T:
        async with self._take_turn:
            while not self.receiver_gone.is_set() and not self._messages:
                if not self.senders:
                    raise StopAsyncIteration
                await self._wait(self._arrival, f"empty, and none of its {self.senders} open senders sent anything")
            if self.receiver_gone.is_set():
                raise ChannelClosed(f"channel {self.name} was closed here. Receive inside its `async with`.")
            self._room.set()
            return self._messages.popleft()

    def sender_left(self) -> None:
        self.senders -= 1
        self._arrival.set()

    def receiver_left(self) -> None:
        self.receiver_gone.set()
        self._messages.clear()
        self._room.set()
        self._arrival.set()

    def refusal(self) -> ChannelClosed:
        return ChannelClosed(
            f"channel {self.name} was closed by its receiver. Stop sending; the receiver's own error says why."
        )

    async def _wait(self, event: asyncio.Event, state: str) -> None:
        event.clear()
        try:
            async with asyncio.timeout(self._deadline_seconds):
                await event.wait()
        except TimeoutError:
            raise PeerVanished(
                f"channel {self.name} has been {state} for {self._deadline_seconds:g} s. "
                "Look at the stage on its other end, or raise the channel's deadline if it is only slow."
            ) from None
