"""The sending end of a channel between processes. The protocol is in `protocol.py`."""

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Final, Generic, Self, TypeVar

import zmq
import zmq.asyncio

from azr_async.adapters.channels import protocol, wire
from azr_async.adapters.channels.endpoints import (
    ZmqContext,
    broken,
    checked_endpoint,
    connection_news,
    open_socket,
    post,
)
from azr_async.errors import ChannelClosed, ConfigError, MessageError, PeerVanished
from azr_async.messages import Message

M = TypeVar("M", bound=Message)

LAST_WORDS_SECONDS: Final = 0.2
"""For what a receiver said before its connection broke: it may have closed in an orderly way."""


def zmq_sender(
    endpoint: str,
    *,
    name: str,
    peer: str,
    heartbeat_seconds: float = 1.0,
    peer_timeout_seconds: float = 10.0,
    connect_seconds: float = 30.0,
    context: ZmqContext | None = None,
) -> "ZmqSender[M]":
    """A sending end, connected when its `async with` is entered.

    Args:
        endpoint: where the receiver listens: `ipc://...` or `tcp://` on loopback.
        name: how the receiver calls this process in its errors.
        peer: the receiving process, as its log file is called.
        heartbeat_seconds: how often both ends say that they are alive.
        peer_timeout_seconds: silence after which the receiver counts as vanished.
        connect_seconds: how long entering waits for the receiver's first answer.
        context: a `shared_context`, for a process that sends to many others.
    """
    if not protocol.is_name(name):
        limit = protocol.LONGEST_NAME_BYTES
        raise ConfigError(f"{name[:200]!r} cannot name a sender. Use 1 to {limit} printable bytes.")
    return ZmqSender(
        checked_endpoint(endpoint),
        name=name,
        peer=peer,
        heartbeat_seconds=heartbeat_seconds,
        peer_timeout_seconds=peer_timeout_seconds,
        connect_seconds=connect_seconds,
        context=context,
    )


class ZmqSender(Generic[M]):
    """Sends while it has credit. Entering connects; leaving waits until everything sent has arrived, then closes."""

    _socket: zmq.asyncio.Socket
    _news: zmq.asyncio.Socket

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        peer: str,
        heartbeat_seconds: float,
        peer_timeout_seconds: float,
        connect_seconds: float,
        context: ZmqContext | None,
    ) -> None:
        self._endpoint, self._name, self._peer = endpoint, name, peer
        self._heartbeat_seconds = heartbeat_seconds
        self._peer_timeout_seconds = peer_timeout_seconds
        self._connect_seconds = connect_seconds
        self._context = context
        self._life = AsyncExitStack()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._sent = self._allowed = self._limit_bytes = 0
        self._is_welcome = self._is_closing = self._is_flushed = self._is_told = False
        self._silent_beats = 0
        self._end: ChannelClosed | PeerVanished | None = ChannelClosed(
            f"the channel to {peer} is not open. Send inside its `async with`."
        )

    async def send(self, message: M) -> None:
        """Hand over in order; waits for credit. A cancelled send has had no effect.

        Raises:
            ChannelClosed: the receiver has closed.
            PeerVanished: the receiver has died, has been silent for too long, or was replaced.
            MessageError: the message cannot travel or is larger than the receiver takes.
        """
        payload = wire.encode(message)
        async with self._turn:
            while self._end is None and self._sent >= self._allowed:
                await self._change()
            if self._end is not None:
                self._is_told = True
                raise self._end
            if len(payload) > self._limit_bytes:
                raise MessageError(
                    f"a {type(message).__name__} of {len(payload)} bytes is more than the {self._limit_bytes} that "
                    f"{self._peer} takes. Raise wires.message_mb, or lower flow.solve_samples if it is a batch."
                )
            self._sent += 1
            self._say(protocol.DATA, protocol.number_frame(self._sent), payload)

    async def ended(self) -> ChannelClosed | PeerVanished:
        """Wait until nothing can be sent any more; the error that `send` would raise."""
        while self._end is None:
            await self._change()
        self._is_told = True
        return self._end

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._socket = await stack.enter_async_context(open_socket(zmq.DEALER, self._endpoint, self._context))
            self._news = stack.enter_context(connection_news(self._socket))
            self._socket.connect(self._endpoint)
            tasks = asyncio.TaskGroup()
            await tasks.__aenter__()
            # Not `async with tasks`: that would wrap the body's own error into a group.
            stack.push_async_callback(tasks.__aexit__, None, None, None)
            for work in (self._listen(), self._beat(), self._watch()):
                stack.callback(tasks.create_task(work, name=f"{self._name}->{self._peer}").cancel)
            self._end = None
            stack.push_async_exit(self._close)  # also when joining fails: the receiver may have heard us
            await self._join()
            self._life = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._life.__aexit__(*exc_info)  # type: ignore[arg-type]

    async def _join(self) -> None:
        self._say(protocol.HELLO, self._name.encode())
        try:
            async with asyncio.timeout(self._connect_seconds):
                while not self._is_welcome:
                    await self._change()
        except TimeoutError:
            text = protocol.silence(self._name, self._peer, self._endpoint, self._connect_seconds)
            raise PeerVanished(text) from None

    async def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say that this was all. After an error or a cancellation nobody waits for the answer.

        Raises:
            PeerVanished: nobody confirmed what was sent, and no `send` has said so before.
        """
        if self._end is None:
            self._is_closing = True
            self._say(protocol.CLOSE, protocol.number_frame(self._sent))
            while kind is None and self._end is None and not self._is_flushed:
                await self._change()
        vanished = self._end if isinstance(self._end, PeerVanished) else None
        self._end = ChannelClosed(f"the channel to {self._peer} was closed here. Send inside its `async with`.")
        if vanished is not None and kind is None and not self._is_told:
            raise vanished

    async def _listen(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            self._silent_beats = 0
            with suppress(ValueError):  # damaged on the way: the receiver repeats what matters
                kind, *arguments = protocol.unsealed(frames)
                self._hear(kind, arguments)
            self._changed.set()

    def _hear(self, kind: bytes, arguments: list[bytes]) -> None:
        match kind, arguments:
            case protocol.WELCOME, [allowed, limit]:
                self._allowed = max(self._allowed, protocol.read_number(allowed))
                self._limit_bytes = protocol.read_number(limit)
                self._is_welcome = True
            case protocol.ALLOW, [allowed]:
                self._allowed = max(self._allowed, protocol.read_number(allowed))
            case protocol.GOODBYE, []:
                self._is_flushed = True
            case protocol.CLOSED, []:
                self._end = ChannelClosed(
                    f"{self._peer} has closed the channel at {self._endpoint}. Look at logs/{self._peer}.log for why."
                )
            case protocol.DAMAGED, [number]:
                count = protocol.read_number(number)
                self._end = self._end or PeerVanished(protocol.damage(self._name, count, "here", self._peer))
            case protocol.UNKNOWN, [] if self._is_welcome and not self._is_flushed:  # else it answers a late heartbeat
                self._end = self._end or PeerVanished(
                    f"{self._peer} at {self._endpoint} no longer knows {self._name}: it was restarted, or it heard "
                    f"nothing from here for too long. Look at logs/{self._peer}.log and connect again."
                )

    def _say(self, *frames: bytes) -> None:
        post(self._socket, *protocol.sealed(*frames))

    async def _beat(self) -> None:
        # Silence is counted in beats, not read off the clock: while this process itself is held up, nothing is counted.
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            if not self._is_welcome:
                self._say(protocol.HELLO, self._name.encode())
                continue
            self._say(protocol.CLOSE if self._is_closing else protocol.BEAT, protocol.number_frame(self._sent))
            self._silent_beats += 1
            seconds = self._silent_beats * self._heartbeat_seconds
            if self._end is None and seconds > self._peer_timeout_seconds:
                self._end = PeerVanished(protocol.silence(self._name, self._peer, self._endpoint, seconds))
                self._changed.set()

    async def _watch(self) -> None:
        """A broken connection tells at once what silence would tell late: the receiver knows no other as this one."""
        while True:
            await broken(self._news)
            await asyncio.sleep(LAST_WORDS_SECONDS)
            if self._end is None and self._is_welcome:
                self._end = PeerVanished(
                    f"{self._peer} at {self._endpoint} has died: its connection to {self._name} broke. "
                    f"Look at logs/{self._peer}.log."
                )
                self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
