"""Length-prefixed frames over pipes, and the fixed-size messages between pool and zygote."""

import os
import struct
from collections.abc import Iterator
from typing import Final

ORDER: Final = struct.Struct("<I")
"""pool -> zygote. Wall milliseconds: the waiting child has its request, and so much time from now on."""
REPORT: Final = struct.Struct("<BiIII")
"""zygote -> pool. Was killed at its deadline, wait status, user and system CPU microseconds, peak memory in KiB.

Or `NO_FORK` and an error number: there is no child.
"""
NO_FORK: Final = 2
NOTE: Final = b"P"
"""A frame that is no claim about an input: from now on a process or a thread is being started."""
CHUNK_BYTES: Final = 1 << 16
ARGUMENTS: Final = "__arguments__"
"""The function that a compiled input expression calls with the arguments."""

SURE: Final = b"-"
DOUBTFUL: Final = b"?"
"""Marks of parsed texts: what comes of a doubtful one may hang on hashes or clocks."""


def read_frame(fd: int) -> bytes | None:
    """The next frame's content; None at the end of the stream. Nobody sends a second frame before it is answered."""
    content = bytearray(os.read(fd, CHUNK_BYTES))
    while len(content) < 4 or len(content) < 4 + int.from_bytes(content[:4], "little"):
        chunk = os.read(fd, CHUNK_BYTES)
        if not chunk:
            return None
        content += chunk  # in place: a frame of megabytes is not copied for every piece of it
    return bytes(memoryview(content)[4:])


def write_frame(fd: int, content: bytes) -> None:
    """Write the whole frame; waits while the pipe is full."""
    rest = memoryview(with_length(content))
    while rest:
        rest = rest[os.write(fd, rest) :]


def with_length(content: bytes) -> bytes:
    """One frame, or one part of a frame."""
    return len(content).to_bytes(4, "little") + content


def split_parts(content: bytes) -> Iterator[bytes]:
    """The parts that `with_length` made. Raises ValueError if they do not fill `content` exactly."""
    start = 0
    while start < len(content):
        end = start + 4 + int.from_bytes(content[start : start + 4], "little")
        if end > len(content):
            raise ValueError("a part is longer than its frame")
        yield content[start + 4 : end]
        start = end
