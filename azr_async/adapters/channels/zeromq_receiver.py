"""The receiving end of a channel between processes. The protocol is in `protocol.py`."""

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Final, Generic, Self, TypeVar

import zmq
import zmq.asyncio

from azr_async.adapters.channels import wire
from azr_async.adapters.channels.endpoints import bound, checked_endpoint, open_socket, post
from azr_async.adapters.channels.roll import Frames, Roll, Terms
from azr_async.errors import ChannelClosed, ConfigError, MessageError, PeerVanished
from azr_async.messages import Message

M = TypeVar("M", bound=Message)

LIMIT_BYTES: Final = 256 * 2**20
"""Largest message by default: a batch of 4096 rollouts of 4096 tokens is 200 MB."""

SLACK_BYTES: Final = 65_536
READS_AT_ONCE: Final = 64


def zmq_receiver(
    endpoint: str,
    kinds: tuple[type[M], ...],
    *,
    name: str,
    capacity: int,
    expected_senders: int | None = None,
    join_seconds: float | None = None,
    heartbeat_seconds: float = 1.0,
    peer_timeout_seconds: float = 10.0,
    limit_bytes: int = LIMIT_BYTES,
) -> "ZmqReceiver[M]":
    """A receiving end, listening from when its `async with` is entered.

    Args:
        endpoint: `ipc://...` or `tcp://` on loopback; port `*` lets the system pick one (see `ZmqReceiver.endpoint`).
        kinds: the messages of this channel; all others are refused.
        name: what errors call the channel.
        capacity: unread messages that each sender may have under way.
        expected_senders: iteration ends when this many (None: one) have closed and none is open. One that vanished
            has not closed: another takes its place, as does one of the same name. 0: they come and go, it never ends.
        join_seconds: longest time with fewer senders than expected, or none at all; then `PeerVanished`. None: no
            deadline.
        heartbeat_seconds: how often both ends say that they are alive.
        peer_timeout_seconds: silence after which a sender counts as vanished.
        limit_bytes: larger messages are refused.
    """
    if capacity < 1:
        raise ConfigError(f"channel {name} has room for {capacity} messages. Give it a capacity of at least 1.")
    terms = Terms(
        name=name,
        capacity=capacity,
        expected_senders=1 if expected_senders is None else expected_senders,
        join_seconds=join_seconds,
        heartbeat_seconds=heartbeat_seconds,
        peer_timeout_seconds=peer_timeout_seconds,
        limit_bytes=limit_bytes,
    )
    return ZmqReceiver(checked_endpoint(endpoint), kinds, terms)


class ZmqReceiver(Generic[M]):
    """Receives from every sender that joins. Several tasks may iterate over it; each message goes to one of them.

    After a `PeerVanished` it can be iterated on: the other senders are not affected.
    """

    _socket: zmq.asyncio.Socket

    def __init__(self, endpoint: str, kinds: tuple[type[M], ...], terms: Terms) -> None:
        self.endpoint = endpoint
        self._kinds, self._terms = kinds, terms
        self._roll = Roll(terms, endpoint)
        self._life = AsyncExitStack()
        self._turn = asyncio.Lock()
        self._arrival = asyncio.Event()
        self._is_open = False

    @property
    def senders(self) -> tuple[str, ...]:
        """Names of the senders that have joined and neither closed nor vanished."""
        return tuple(peer.name for peer in self._roll.peers.values())

    @property
    def refused(self) -> int:
        """Messages that were dropped because they are malformed, too large or not of this channel's kinds."""
        return self._roll.refused

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        """The next message; StopAsyncIteration when the expected senders have closed and all was delivered.

        Raises:
            PeerVanished: once for each sender that stopped answering, after what it had sent.
        """
        async with self._turn:
            while self._is_open:
                while self._roll.arrived:
                    message = self._taken()
                    if message is not None:
                        return message
                if self._roll.is_over:
                    raise StopAsyncIteration
                self._arrival.clear()
                await self._arrival.wait()
            raise ChannelClosed(f"channel {self._terms.name} is not open here. Receive inside its `async with`.")

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._socket = await stack.enter_async_context(open_socket(zmq.ROUTER, self.endpoint))
            # A little over the limit is refused and counted here; far over it, ZeroMQ drops the connection.
            self._socket.set(zmq.MAXMSGSIZE, self._terms.limit_bytes + SLACK_BYTES)
            self.endpoint = stack.enter_context(bound(self._socket, self.endpoint))
            self._roll = Roll(self._terms, self.endpoint)
            tasks = asyncio.TaskGroup()
            await tasks.__aenter__()
            # Not `async with tasks`: that would wrap the body's own error into a group.
            stack.push_async_callback(tasks.__aexit__, None, None, None)
            for work in (self._listen(), self._beat()):
                stack.callback(tasks.create_task(work, name=f"channel {self._terms.name}").cancel)
            self._is_open = True
            stack.callback(self._close)
            self._life = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._life.__aexit__(*exc_info)  # type: ignore[arg-type]

    def _close(self) -> None:
        self._is_open = False
        self._arrival.set()
        self._post(self._roll.close())

    def _taken(self) -> M | None:
        """The oldest message, or None when it is refused; either way its sender may send another one."""
        arrival = self._roll.arrived.popleft()
        if isinstance(arrival, PeerVanished):
            raise arrival
        peer, payload = arrival
        self._post(self._roll.taken(peer))
        try:
            message = wire.decode(payload, limit_bytes=self._terms.limit_bytes)
        except MessageError as problem:
            self._roll.refuse(peer.name, str(problem))
            return None
        if isinstance(message, self._kinds):
            return message
        self._roll.refuse(peer.name, f"a {type(message).__name__} does not belong on this channel")
        return None

    async def _listen(self) -> None:
        at_once: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket)  # a third of the price, for what is already there
        while True:
            self._hear(await self._socket.recv_multipart())
            with suppress(zmq.Again):
                for _ in range(READS_AT_ONCE):
                    self._hear(at_once.recv_multipart(zmq.DONTWAIT))
            await asyncio.sleep(0)  # a peer that floods us may not keep the others waiting

    def _hear(self, parts: list[bytes]) -> None:
        identity, *frames = parts
        self._post(self._roll.hear(identity, frames))
        self._arrival.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._terms.heartbeat_seconds)
            self._post(self._roll.beat())
            self._arrival.set()

    def _post(self, told: list[Frames]) -> None:
        for frames in told:
            post(self._socket, *frames)
