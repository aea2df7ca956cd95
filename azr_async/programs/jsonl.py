"""Tools that answer JSON lines: each line in, one line out, in the same order, each written as soon as it is known.

A line that cannot be read gets an answer too; it never ends the stream. Lines are worked on side by side, so that one
that takes long keeps back only the writing of those after it, not their work.
"""

import asyncio
import json
import os
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final

from azr_async.errors import AzrError

LINE_BYTES: Final = 1 << 22
CHUNK_BYTES: Final = 1 << 16
LINES_IN_WORK: Final = 2048
"""Lines that are read before the first of them is answered."""

Row = Mapping[str, Any]
Answer = Callable[[Row], Awaitable[Row]]


class InputError(AzrError):
    """The file of lines cannot be read, or the file for the answers cannot be written."""


class BadLine(Exception):
    """One line is not what the tool works on; its answer says why."""


async def answer_lines(source: str, output: Path | None, *, answer: Answer, refuse: Callable[[Row, str], Row]) -> None:
    """Answer every line of `source`.

    Args:
        source: a file, or `-` for standard input.
        output: where the answers go; None is standard output.
        answer: makes the answer to one line's object; may raise BadLine.
        refuse: makes the answer to a line that is bad, from its object (empty if there is none) and the reason.

    Raises:
        InputError: `source` or `output` cannot be opened.
    """
    work: asyncio.Queue[asyncio.Task[Row] | None] = asyncio.Queue(LINES_IN_WORK)

    async def respond(line: bytes) -> Row:
        row: Row = {}
        try:
            row = _object(line)
            return await answer(row)
        except BadLine as problem:
            return refuse(row, str(problem))

    with ExitStack() as files:
        lines = _open_lines(source, files)
        sink = _open_sink(output, files)
        async with asyncio.TaskGroup() as group:

            async def read() -> None:
                async for line in lines:
                    if line.strip():
                        await work.put(group.create_task(respond(line)))
                await work.put(None)

            group.create_task(read())
            while (task := await work.get()) is not None:
                sink.write(json.dumps(await task).encode() + b"\n")
                sink.flush()


def text_field(row: Row, name: str) -> str:
    """The text in field `name`. Raises BadLine when it is missing or something else."""
    value = row.get(name)
    if not isinstance(value, str):
        raise BadLine(f"field {name!r} is {'missing' if name not in row else 'not a text'}")
    return value


def _object(line: bytes) -> Row:
    if len(line) > LINE_BYTES:
        raise BadLine(f"the line is longer than {LINE_BYTES} bytes")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"the line is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadLine("the line is not a JSON object")
    return row


def _open_lines(source: str, files: ExitStack) -> AsyncIterator[bytes]:
    if source == "-":
        return _lines_of(sys.stdin.buffer)
    try:
        return _lines_of(files.enter_context(open(source, "rb")))
    except OSError as error:
        raise InputError(
            f"{source} cannot be read ({error.strerror}). Name a file of JSON lines, or - to stream."
        ) from None


def _open_sink(output: Path | None, files: ExitStack) -> BinaryIO:
    if output is None:
        return sys.stdout.buffer
    try:
        return files.enter_context(output.open("wb"))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}). Choose another --output.") from None


async def _lines_of(file: BinaryIO) -> AsyncIterator[bytes]:
    """Lines without their ends. Of one that is too long only the beginning comes, still longer than `LINE_BYTES`."""
    line = bytearray()
    is_skipping = False
    async for chunk in _chunks_of(file.fileno()):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            if not is_skipping:
                yield bytes(line + end)
            line.clear()
            is_skipping = False
        line += rest
        if len(line) > LINE_BYTES:
            if not is_skipping:
                yield bytes(line)
            line.clear()
            is_skipping = True
    if line and not is_skipping:
        yield bytes(line)


async def _chunks_of(fd: int) -> AsyncIterator[bytes]:
    mode = os.fstat(fd).st_mode
    may_wait = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)
    while True:
        if may_wait:
            await _readable(fd)
        chunk = os.read(fd, CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


async def _readable(fd: int) -> None:
    """Wait without making `fd` non-blocking, which whoever shares it would notice."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
