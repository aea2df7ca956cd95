"""Length-prefixed frames over pipes, and the fixed-size messages between pool and zygote."""

import os
import struct
from collections.abc import Iterator
from typing import Final

ORDER: Final = struct.Struct("<II")
"""pool -> zygote. Wall milliseconds, CPU seconds: fork a child under these limits."""
REPORT: Final = struct.Struct("<BiIII")
"""zygote -> pool. Was killed at its deadline, wait status, user and system CPU microseconds, peak memory in KiB."""
ARGUMENTS: Final = "__arguments__"
"""The function that a compiled input expression calls with the arguments."""


def read_frame(fd: int) -> bytes | None:
    """The next frame's content; None at the end of the stream."""
    head = _read_exactly(fd, 4)
    return None if head is None else _read_exactly(fd, int.from_bytes(head, "little"))


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


def _read_exactly(fd: int, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        chunk = os.read(fd, size - len(content))
        if not chunk:
            return None
        content += chunk
    return bytes(content)
