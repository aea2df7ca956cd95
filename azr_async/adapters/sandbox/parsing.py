"""The parser services as the pool sees them: requests that wait at the same time travel together.

Waking another process up costs more than parsing a small program. When a frame of several requests fails, because one
of them took too long or broke the parser, each is sent again alone: no text can take another one down with it.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from azr_async.adapters.sandbox.helpers import Helper, HelperGone
from azr_async.adapters.sandbox.inside.wire import split_parts, with_length
from azr_async.adapters.sandbox.lanes import Lane
from azr_async.adapters.sandbox.slots import CHUNK_BYTES, RequestWriter

PARSE_SECONDS: Final = 5.0
REPLY_BYTES: Final = 1 << 24
TOGETHER: Final = 16
TOGETHER_CHARACTERS: Final = 1 << 17
ATTEMPTS: Final = 3


@dataclass(eq=False, slots=True)
class _Request:
    text: str
    answer: bytes | None = None
    must_go_alone: bool = False


class ParsingDesk:
    """Hands requests to the parsers of a lane."""

    def __init__(self, parsers: Lane["Parser"]) -> None:
        self._parsers = parsers
        self._waiting: list[_Request] = []

    async def parse(self, text: str) -> bytes | None:
        """The parts that answer one request, as JSON text; None if it cannot be answered within limits."""
        request = _Request(text)
        self._waiting.append(request)
        try:
            for _ in range(ATTEMPTS):
                async with self._parsers.member() as parser:
                    # Whoever gets a parser takes along those who wait behind.
                    if request.answer is None and not await self._send(parser, self._together_with(request)):
                        break
                if request.answer is not None:
                    break
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
        return request.answer

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

    async def _send(self, parser: "Parser", batch: Sequence[_Request]) -> bool:
        """Whether trying again makes sense for the first request, if it has no answer now."""
        try:
            answers = list(split_parts(await parser.parse(f"[{','.join(request.text for request in batch)}]".encode())))
        except (TimeoutError, HelperGone) as failure:
            is_culprit = len(batch) == 1 and isinstance(failure, TimeoutError)
            for request in batch:
                request.must_go_alone = True
            return not is_culprit
        for request, answer in zip(batch, answers, strict=True):
            request.answer = answer
        return True


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

    async def parse(self, request: bytes) -> bytes:
        """The answering frame. Raises HelperGone when the parser ends, TimeoutError after `PARSE_SECONDS`."""
        self._content.clear()
        replied: asyncio.Future[bytes] = self._loop.create_future()
        self._replied = replied
        deadline = self._loop.call_later(PARSE_SECONDS, self._give_up)
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
        self._content += chunk
        size = 4 + int.from_bytes(self._content[:4], "little") if len(self._content) >= 4 else 4
        if not chunk or self._replied is None or size > REPLY_BYTES or len(self._content) > size:
            self._break("the parser has ended or talks nonsense")
        elif len(self._content) == size and size > 4 and not self._replied.done():
            self._replied.set_result(bytes(self._content[4:]))

    def _give_up(self) -> None:
        if self._replied is not None and not self._replied.done():
            self._replied.set_exception(TimeoutError())

    def _break(self, reason: str) -> None:
        if self._replied is not None and not self._replied.done():
            self._replied.set_exception(HelperGone(reason))
        elif self._replied is None:
            self.close()
