"""Tools that answer JSON lines: each line in, one line out, in the same order, each written as soon as it is known.

A line that cannot be read gets an answer too; it never ends the stream. Lines are worked on side by side, so that one
that takes long keeps back only the writing of those after it, not their work.
"""

import argparse
import asyncio
import errno
import json
import math
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import uvloop

from azr_async.errors import AzrError

LINE_BYTES: Final = 1 << 22
CHUNK_BYTES: Final = 1 << 16
PIPE_BYTES: Final = 4096
"""A pipe that can be written takes so much without waiting."""
LINES_IN_WORK: Final = 2048
"""Lines that are read before the first of them is answered."""

READER_GONE_STATUS: Final = 128 + signal.SIGPIPE
"""How a shell sees a program that wrote into a closed pipe."""

Row = Mapping[str, Any]
Answer = Callable[[Row], Awaitable[Row]]


class InputError(AzrError):
    """The file of lines cannot be read, or the file for the answers cannot be written."""


class ReaderGone(AzrError):
    """Nobody reads the answers any more."""


class BadLine(Exception):
    """One line is not what the tool works on; its answer says why."""


def run_tool(
    parser: argparse.ArgumentParser, arguments: Sequence[str], work: Callable[[argparse.Namespace], Awaitable[int]]
) -> int:
    """Parse the command line, then do the tool's work; the exit status.

    0 done (or whatever `work` returns), 1 failed, 2 wrong usage, 130 after Ctrl-C, 141 if nobody reads the answers.
    """
    _fill_standard_descriptors()
    tool = parser.prog.rpartition(" ")[2]
    try:
        options = parser.parse_args(arguments)
    except SystemExit as leaving:  # argparse has told the user what is wrong, or what --help asks for
        return int(leaving.code or 0)
    try:
        status = uvloop.run(_flushed(work(options)))
    except KeyboardInterrupt:
        return 130
    except (AzrError, OSError, ExceptionGroup) as error:
        return _told(tool, error)
    return status


async def _flushed(work: Awaitable[int]) -> int:
    status = await work
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


def _told(tool: str, error: Exception) -> int:
    """Say what went wrong, in one line; the exit status. What nobody can act on is raised again."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ReaderGone | BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the interpreter still wants to write at its end
        return READER_GONE_STATUS
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        error = InputError(f"the answers cannot be written ({error.strerror}). Make room, or choose another --output.")
    if not isinstance(error, AzrError):
        raise error
    print(f"{tool}: {error}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def _fill_standard_descriptors() -> None:
    """Where a process was started without one of the first three, the next file would take its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)


async def answer_lines(source: str, output: Path | None, *, answer: Answer, refuse: Callable[[Row, str], Row]) -> None:
    """Answer every line of `source`.

    Args:
        source: a file, or `-` for standard input.
        output: where the answers go; None is standard output. A file is there when all lines are answered; until then,
            and if that never happens, the answers are in a file beside it, with `.part` at the end of its name.
        answer: makes the answer to one line's object; may raise BadLine.
        refuse: makes the answer to a line that is bad, from its object (empty if there is none) and the reason.

    Raises:
        InputError: `source` or `output` cannot be opened, or written on, or they are the same file.
        ReaderGone: the other end of the pipe of answers was closed.
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
        lines_fd = _open_lines(source, files)
        sink_fd = files.enter_context(_open_sink(output, lines_fd))
        async with asyncio.TaskGroup() as group:

            async def read() -> None:
                async for line in _lines_of(lines_fd):
                    if line.strip():
                        await work.put(group.create_task(respond(line)))
                await work.put(None)

            group.create_task(read())
            while (task := await work.get()) is not None:
                await _write(sink_fd, json.dumps(await task).encode() + b"\n")


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
        row = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"the line is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadLine("the line is not a JSON object")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _open_lines(source: str, files: ExitStack) -> int:
    if source == "-":
        return _standard(sys.stdin, "input")
    try:
        return files.enter_context(open(source, "rb", buffering=0)).fileno()
    except OSError as error:
        raise InputError(
            f"{source} cannot be read ({error.strerror}). Name a file of JSON lines, or - to stream."
        ) from None


def _standard(stream: Any, name: str) -> int:  # noqa: ANN401 - None where the process was started without it
    if stream is None:
        raise InputError(f"standard {name} is closed. Name a file instead.")
    return int(stream.fileno())


@contextmanager
def _open_sink(output: Path | None, lines_fd: int) -> Iterator[int]:
    """The descriptor for the answers; a file gets its name when all went well."""
    if output is None:
        yield _standard(sys.stdout, "output")
        return
    target = Path(os.path.realpath(output))
    is_file = target.is_file() or not target.exists()
    place = target.with_name(f"{target.name}.part") if is_file else target
    for path in (target, place):
        if is_file and path.exists() and os.path.samestat(path.stat(), os.fstat(lines_fd)):
            raise InputError(f"{path} is the file that is read. Choose another --output.")
    try:
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if is_file else 0), 0o666)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}). Choose another --output.") from None
    is_done = False
    try:
        yield fd
        is_done = True
    finally:
        has_answers = os.fstat(fd).st_size > 0
        os.close(fd)
        if is_file and is_done:
            place.replace(target)
        elif is_file and has_answers:
            print(f"The answers so far are in {place}.", file=sys.stderr)
        elif is_file:
            place.unlink()


async def _write(fd: int, content: bytes) -> None:
    """Write it all. While a reader does not read, only this task waits, and can be cancelled."""
    rest = memoryview(content)
    may_wait = _may_wait(fd)
    try:
        while rest:
            if may_wait:
                await _ready(fd, asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer)
            rest = rest[os.write(fd, rest[:PIPE_BYTES] if may_wait else rest) :]
    except BrokenPipeError:
        raise ReaderGone("nobody reads the answers any more. Read them to the end, or name an --output.") from None
    except OSError as error:
        raise InputError(f"the answers cannot be written ({error.strerror}). Choose another --output.") from None


async def _lines_of(fd: int) -> AsyncIterator[bytes]:
    """Lines without their ends. Of one that is too long only the beginning comes, still longer than `LINE_BYTES`."""
    line = bytearray()
    is_skipping = False
    async for chunk in _chunks_of(fd):
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
    may_wait = _may_wait(fd)
    loop = asyncio.get_running_loop()
    while True:
        if may_wait:
            await _ready(fd, loop.add_reader, loop.remove_reader)
        try:
            chunk = os.read(fd, CHUNK_BYTES)
        except OSError as error:
            raise InputError(f"the lines cannot be read ({error.strerror}). Name a file, or - to stream.") from None
        if not chunk:
            return
        yield chunk


def _may_wait(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


async def _ready(fd: int, watch: Callable[[int, Callable[[], None]], object], unwatch: Callable[[int], object]) -> None:
    """Wait without making `fd` non-blocking, which whoever shares it would notice."""
    ready = asyncio.Event()
    watch(fd, ready.set)
    try:
        await ready.wait()
    finally:
        unwatch(fd)
