"""A socket in a run's private folder, through which its owner asks the launcher for more or fewer inference workers.

One line of JSON each way. The folder can only be entered by the run's owner; what arrives is checked all the same.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from azr_async.errors import AzrError, ConfigError

SOCKET: Final = "mailbox"
POINTER: Final = "wires"
"""In the run's folder: where its private folder is."""
LONGEST_LINE_BYTES: Final = 4096
IO_SECONDS: Final = 5.0
"""Longest time for one line to come, or to go."""
MOST_WORKERS: Final = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersOrder:
    """Which inference workers a run is to have: so many more, these no more, or so many in all."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    add: Annotated[int, Field(ge=0, le=MOST_WORKERS)] = 0
    remove: tuple[str, ...] = ()
    total: Annotated[int, Field(ge=1, le=MOST_WORKERS)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the launcher says to an order."""

    is_done: bool
    text: str


_ORDERS: Final = TypeAdapter(WorkersOrder)
_ANSWERS: Final = TypeAdapter(Answer)
CarryOut = Callable[[WorkersOrder], Awaitable[str]]


@asynccontextmanager
async def mailbox(run_dir: Path, wires_dir: Path, carry_out: CarryOut) -> AsyncIterator[None]:
    """Take orders until the block is left; an AzrError of `carry_out` is told to who has ordered."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, ValueError, TimeoutError):  # who has asked does not wait any more
            async with asyncio.timeout(IO_SECONDS):
                line = await reader.readline()
            answer = await _answered(line, carry_out)
            async with asyncio.timeout(IO_SECONDS):
                writer.write(json.dumps(asdict(answer)).encode() + b"\n")
                await writer.drain()

    path, pointer, serving = wires_dir / SOCKET, run_dir / POINTER, list[asyncio.Task[None]]()
    async with asyncio.TaskGroup() as group:
        server = await asyncio.start_unix_server(
            lambda reader, writer: serving.append(group.create_task(serve(reader, writer), name="order")),
            path,
            limit=LONGEST_LINE_BYTES,
        )
        path.chmod(0o600)
        pointer.write_text(str(wires_dir), encoding="utf-8")
        try:
            yield
        finally:
            pointer.unlink(missing_ok=True)
            server.close()
            for task in serving:
                task.cancel()


async def ask(run_dir: Path, order: WorkersOrder, *, deadline_seconds: float) -> str:
    """Have the launcher of a run carry out an order; returns what it says.

    Raises ConfigError when no such run lives, it does not answer, or it refuses.
    """
    try:
        path = _socket_of(run_dir)
        async with asyncio.timeout(deadline_seconds):
            reader, writer = await asyncio.open_unix_connection(path, limit=LONGEST_LINE_BYTES)
            with closing(writer):
                writer.write(json.dumps(asdict(order)).encode() + b"\n")
                answer = _ANSWERS.validate_json(await reader.readline())
    except TimeoutError:
        raise ConfigError(
            f"the launcher of {run_dir} did not answer within {deadline_seconds:g} s. It may be stopped (Ctrl-Z), or "
            "its terminal held up (Ctrl-S): let it go on, and ask again."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no run is going on in {run_dir}: {error}. Name the folder of a run that is, as its first line tells it."
        ) from None
    if not answer.is_done:
        raise ConfigError(answer.text)
    return answer.text


def _socket_of(run_dir: Path) -> Path:
    wires_dir = Path((run_dir / POINTER).read_text(encoding="utf-8"))
    if wires_dir.stat().st_uid != os.getuid():
        raise PermissionError(f"{wires_dir} belongs to somebody else")
    return wires_dir / SOCKET


async def _answered(line: bytes, carry_out: CarryOut) -> Answer:
    try:
        return Answer(is_done=True, text=await carry_out(_ORDERS.validate_json(line)))
    except ValidationError as error:
        return Answer(is_done=False, text=f"this is no order: {error}. Use the same version of azr_async.")
    except AzrError as error:
        return Answer(is_done=False, text=str(error))
