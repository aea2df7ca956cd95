"""A proxy on one end of a wire: passes everything on, and does to one message what it is told.

It listens where a program expects its peer, and connects to where the peer really is. Both programs speak ZeroMQ and
notice nothing but what is done to their messages; when one of them goes, the other one's connection breaks as well.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from azr_async.algorithm.fault_schedule import Part
from azr_async.faults.zmtp import Frame, greeting_parts, read_message, with_bit_turned

Action = Literal["drop", "delay", "duplicate", "corrupt"]
DATA: Final = b"DATA"
RETRY_SECONDS: Final = 0.02
"""As ZeroMQ itself waits between two tries to connect."""
CONNECT_SECONDS: Final = 30.0
"""ZeroMQ's own limit for a handshake."""
STREAM_BYTES: Final = 2**20


@dataclass(slots=True)
class Tampering:
    """What is to be done to one message of a wire."""

    action: Action
    part: Part = "message"
    passed: int = 0
    """How many such parts go by before."""
    seconds: float = 0.0
    bit: int = 0
    hit: "asyncio.Future[str]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """What it was done to, in words; once it was."""

    def is_meant(self, frames: list[Frame], *, is_answer: bool) -> bool:
        """Is this the message? Counts those that go by."""
        is_message = frames[0].body == DATA
        part: Part = "answer" if is_answer else "message" if is_message else "control"
        if part != self.part or self.hit.done():
            return False
        self.passed -= 1
        return self.passed < 0


class Proxy:
    """Stands at `listens_at`, before whoever listens at `peer`."""

    def __init__(self, listens_at: Path, peer: Path) -> None:
        self.messages = 0
        """That went through, both ways."""
        self._listens_at, self._peer = listens_at, peer
        self._tampering: Tampering | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def arm(self, tampering: Tampering) -> None:
        """Do this, once, to the first message that is meant, and forget what was armed before."""
        self._tampering = tampering

    def disarm(self) -> None:
        """Do nothing more."""
        self._tampering = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Proxy"]:
        """Listen; on leaving all connections break."""
        server = await asyncio.start_unix_server(self._accept, self._listens_at, limit=STREAM_BYTES)
        try:
            yield self
        finally:
            server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, ValueError, TimeoutError, asyncio.CancelledError):
            pass  # whatever ends one side of a connection ends the other
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            peer_reader, peer_writer = await self._connect()
        ways = (
            asyncio.create_task(self._pass_on(reader, peer_writer, is_answer=False)),
            asyncio.create_task(self._pass_on(peer_reader, writer, is_answer=True)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            peer_writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Where nobody listens yet: try again, as ZeroMQ would. Its own end must not see a connection that breaks."""
        while True:
            with suppress(OSError):
                return await asyncio.open_unix_connection(self._peer, limit=STREAM_BYTES)
            await asyncio.sleep(RETRY_SECONDS)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        async for part in greeting_parts(reader):
            writer.write(part)
        while True:
            frames = await read_message(reader)
            if not frames[0].is_command:
                self.messages += 1
                frames = await self._tampered(frames, is_answer=is_answer)
            writer.write(b"".join(frame.to_bytes() for frame in frames))
            await writer.drain()

    async def _tampered(self, frames: list[Frame], *, is_answer: bool) -> list[Frame]:
        tampering = self._tampering
        if tampering is None or not tampering.is_meant(frames, is_answer=is_answer):
            return frames
        self._tampering = None
        size = sum(len(frame.body) for frame in frames)
        word = frames[0].body[:12].decode("ascii", errors="replace")
        tampering.hit.set_result(f"{word}, {size} bytes")
        match tampering.action:
            case "drop":
                return []
            case "duplicate":
                return [*frames, *frames]
            case "corrupt":
                return with_bit_turned(frames, tampering.bit)
            case "delay":
                await asyncio.sleep(tampering.seconds)
                return frames
