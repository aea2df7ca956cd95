"""ZeroMQ's messages as bytes of a stream (ZMTP 3.1, rfc.zeromq.org/spec/37): enough to tell one from the next.

A connection begins with a greeting of 64 bytes each way. Then come frames: a byte of flags, the length in 1 or 8 bytes,
the body. A message is frames up to the first without MORE; a COMMAND is ZeroMQ's own (handshake, ping).
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

GREETING_BYTES: Final = 64
MORE, LONG, COMMAND = 1, 2, 4
LONGEST_SHORT_BYTES: Final = 255
LONGEST_BODY_BYTES: Final = 2**31


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it travels."""

    flags: int
    body: bytes

    @property
    def is_command(self) -> bool:
        """Does it belong to ZeroMQ itself?"""
        return bool(self.flags & COMMAND)

    def to_bytes(self) -> bytes:
        """Flags, length, body."""
        is_long = len(self.body) > LONGEST_SHORT_BYTES
        flags = self.flags & ~LONG | (LONG if is_long else 0)
        return bytes([flags]) + len(self.body).to_bytes(8 if is_long else 1, "big") + self.body


async def greeting_parts(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The greeting as it comes: each side sends the rest of its own only when it has seen the beginning of the other's.

    Raises EOFError when the peer leaves before its end.
    """
    left = GREETING_BYTES
    while left:
        part = await stream.read(left)
        if not part:
            raise EOFError("the peer left during the greeting")
        left -= len(part)
        yield part


async def read_message(stream: asyncio.StreamReader) -> list[Frame]:
    """The frames of one message, or one command.

    Raises IncompleteReadError when the peer has left, ValueError when the bytes are no ZMTP.
    """
    frames = [await _read_frame(stream)]
    while frames[-1].flags & MORE and not frames[-1].is_command:
        frames.append(await _read_frame(stream))
    return frames


def with_bit_turned(frames: list[Frame], bit: int) -> list[Frame]:
    """The same with one bit of the bodies turned around: the `bit`-th, modulo how many there are."""
    sizes = [8 * len(frame.body) for frame in frames]
    if not sum(sizes):
        return frames
    rest, turned = bit % sum(sizes), list(frames)
    for index, size in enumerate(sizes):
        if rest < size:
            body = bytearray(frames[index].body)
            body[rest // 8] ^= 1 << rest % 8
            turned[index] = Frame(frames[index].flags, bytes(body))
            break
        rest -= size
    return turned


async def _read_frame(stream: asyncio.StreamReader) -> Frame:
    flags = (await stream.readexactly(1))[0]
    if flags & ~(MORE | LONG | COMMAND):
        raise ValueError(f"a frame with flags {flags:#x} is not ZMTP")
    length = int.from_bytes(await stream.readexactly(8 if flags & LONG else 1), "big")
    if length > LONGEST_BODY_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    return Frame(flags, await stream.readexactly(length))
