"""The parser services as the pool sees them: requests that wait at the same time travel together.

Waking another process up costs more than parsing a small program. When a frame of several requests fails, because one
of them took too long or broke the parser, each is sent again alone: no text can take another one down with it.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Final

from azr_async.adapters.sandbox.helpers import Helper, HelperGone, HelperKilled
from azr_async.adapters.sandbox.inside.wire import split_parts, with_length
from azr_async.adapters.sandbox.lanes import Lane
from azr_async.adapters.sandbox.permits import Permit
from azr_async.adapters.sandbox.slots import CHUNK_BYTES, RequestWriter

TOGETHER_SECONDS: Final = 0.5
ALONE_SECONDS: Final = 1.5
STRAGGLER_SECONDS: Final = 0.2
REPLY_BYTES: Final = 1 << 25
TOGETHER: Final = 16
TOGETHER_CHARACTERS: Final = 1 << 17
PIECE_CHARACTERS: Final = 1 << 16
"""Texts of one call that are together longer travel apart."""
ATTEMPTS: Final = 3
UNREAD: Final = b"Uit cannot be parsed within limits"
LOST: Final = b"Kthe parser was killed from outside"


@dataclass(eq=False, slots=True)
class _Request:
    text: str
    parts: int
    """How many parts its answer has."""
    answer: list[bytes] | None = None
    must_go_alone: bool = False
    is_lost: bool = False
    """One of its parsers was killed from outside."""


class ParsingDesk:
    """Hands requests to the parsers of a lane: `together` of them compute, not counting those that take long."""

    def __init__(self, parsers: Lane["Parser"], *, together: int) -> None:
        self._parsers = parsers
        self._permits = asyncio.Semaphore(together)
        self._waiting: list[_Request] = []

    async def parse(self, mode: str, program: str | None, inputs: Sequence[str]) -> list[bytes]:
        """One part for the program, unless it is None, and one for each input (inside/parser.py).

        `UNREAD` where a text cannot be parsed within limits, `LOST` where its parsers were killed from outside: both
        may be different the next time.
        """
        pieces = list(_pieces(program, inputs))
        if len(pieces) == 1:
            return await self._parse_piece(mode, *pieces[0])
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._parse_piece(mode, *piece)) for piece in pieces]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [part for task in tasks for part in task.result()]

    async def _parse_piece(self, mode: str, program: str | None, inputs: Sequence[str]) -> list[bytes]:
        """All its texts in one request; where that fails, each text for itself, so that none pays for another one."""
        request = _Request(_as_json(mode, program, inputs), len(inputs) + (program is not None))
        if request.parts == 1:
            return await self._answer(request, ATTEMPTS) or [LOST if request.is_lost else UNREAD]
        answer = await self._answer(request, ATTEMPTS - 1)
        if answer is not None:
            return answer
        singles = [] if program is None else [_Request(_as_json(mode, program, []), 1)]
        singles += [_Request(_as_json(mode, None, [text]), 1) for text in inputs]
        parts = []
        for single in singles:  # one after the other: a call that is slow to read takes one parser, not all
            single.must_go_alone = True
            parts += await self._answer(single, ATTEMPTS - 1) or [LOST if single.is_lost else UNREAD]
        return parts

    async def _answer(self, request: _Request, attempts: int) -> list[bytes] | None:
        self._waiting.append(request)
        try:
            for _ in range(attempts):
                if request.answer is None:
                    await self._attempt(request)
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
        return request.answer

    async def _attempt(self, request: _Request) -> None:
        await self._permits.acquire()
        permit = Permit(self._permits)
        try:
            if request.answer is not None:
                return
            async with self._parsers.member() as parser:
                permit.expire_in(STRAGGLER_SECONDS)
                # Whoever gets a parser takes along those who wait behind.
                if request.answer is None:
                    await self._send(parser, self._together_with(request))
        finally:
            permit.release()

    def _together_with(self, request: _Request) -> list[_Request]:
        batch = [request]
        if not request.must_go_alone:
            room = TOGETHER_CHARACTERS - len(request.text)
            for other in self._waiting:
                if (
                    other is not request
                    and not other.must_go_alone
                    and len(batch) < TOGETHER
                    and len(other.text) <= room
                ):
                    batch.append(other)
                    room -= len(other.text)
        self._waiting = [other for other in self._waiting if other not in batch]
        return batch

    async def _send(self, parser: "Parser", batch: Sequence[_Request]) -> None:
        """Have the batch parsed, or make sure that each of its requests goes alone the next time."""
        frame = f"[{','.join(request.text for request in batch)}]".encode()
        try:
            reply = await parser.parse(frame, TOGETHER_SECONDS if len(batch) > 1 else ALONE_SECONDS)
            answers = _parts_of(reply, batch)
        except (TimeoutError, HelperGone, ValueError) as error:
            parser.close()
            for request in batch:
                request.must_go_alone = True
                request.is_lost = request.is_lost or isinstance(error, HelperKilled)
            return
        for request, parts in zip(batch, answers, strict=True):
            request.answer = parts


def _pieces(program: str | None, inputs: Sequence[str]) -> Iterator[tuple[str | None, list[str]]]:
    """The texts of one call in their order, at most `PIECE_CHARACTERS` together unless a single one is longer."""
    length, piece = len(program or ""), list[str]()
    for text in inputs:
        if length + len(text) > PIECE_CHARACTERS and (piece or program is not None):
            yield program, piece
            program, length, piece = None, 0, []
        piece.append(text)
        length += len(text)
    yield program, piece


def _as_json(mode: str, program: str | None, inputs: Sequence[str]) -> str:
    """By hand: setting a JSON encoder up takes longer than its work."""
    first = "null" if program is None else encode_basestring_ascii(program)
    return f'["{mode}",{first},[{",".join(map(encode_basestring_ascii, inputs))}]]'


def _parts_of(reply: bytes, batch: Sequence[_Request]) -> list[list[bytes]]:
    """Raises ValueError when these are not the parts that were asked for: texts may have got the better of a parser."""
    answers = [list(split_parts(answer)) for answer in split_parts(reply)]
    if list(map(len, answers)) != [request.parts for request in batch]:
        raise ValueError("another number of parts than was asked for")
    return answers


class Parser:
    """One parser service; one frame of requests at a time."""

    def __init__(self, helper: Helper) -> None:
        self.helper = helper
        self._content = bytearray()
        self._replied: asyncio.Future[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(helper.result_fd, self._on_reply)
        self._writer = RequestWriter(helper.request_fd)
        self.is_broken = False

    async def parse(self, request: bytes, seconds: float) -> bytes:
        """The answering frame. Raises HelperGone when the parser ends, TimeoutError after `seconds`."""
        self._content.clear()
        replied: asyncio.Future[bytes] = self._loop.create_future()
        self._replied = replied
        deadline = self._loop.call_later(seconds, self._give_up)
        is_whole = False
        try:
            self._writer.write(with_length(request))
            reply = await replied
            is_whole = True
            return reply
        finally:
            deadline.cancel()
            self._replied = None
            if not is_whole:
                self.close()

    def close(self) -> None:
        """Kill the service; a request in progress raises HelperGone."""
        if not self.is_broken:
            self.is_broken = True
            self._writer.stop()
            self._loop.remove_reader(self.helper.result_fd)
            self.helper.kill()
        if self._replied is not None and not self._replied.done():
            self._replied.set_exception(HelperGone("the sandbox was closed"))

    def _on_reply(self) -> None:
        try:
            chunk = os.read(self.helper.result_fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            is_killed = self._replied is not None and self.helper.ended_by_kill()  # which blocks, so only for an answer
            self._break(HelperKilled("the parser was killed") if is_killed else HelperGone("the parser has ended"))
            return
        self._content += chunk
        size = 4 + int.from_bytes(self._content[:4], "little") if len(self._content) >= 4 else 4
        if self._replied is None or size > REPLY_BYTES or len(self._content) > size:
            self._break(HelperGone("the parser talks nonsense"))
        elif len(self._content) == size and size > 4 and not self._replied.done():
            self._replied.set_result(bytes(self._content[4:]))

    def _give_up(self) -> None:
        if self._replied is not None and not self._replied.done():
            self._replied.set_exception(TimeoutError())

    def _break(self, reason: HelperGone) -> None:
        if self._replied is not None and not self._replied.done():
            self._replied.set_exception(reason)
        elif self._replied is None:
            self.close()
