"""One sandboxed process as the pool sees it: hand it a request, get back what came of it. One request at a time.

A process that was interrupted in any way - cancelled, silent, over a limit - is broken: it is killed with all that it
runs, and never used again.
"""

import asyncio
import os
import select
import time
from typing import Final

from azr_async.adapters.sandbox.helpers import Helper, HelperGone
from azr_async.adapters.sandbox.inside.wire import ORDER, REPORT, with_length
from azr_async.adapters.sandbox.verdicts import Limits, Report

BACKSTOP_SECONDS: Final = 3.0
"""What a zygote gets beyond a program's wall limit to kill it and to report."""
PARSE_SECONDS: Final = 2.0
REPLY_BYTES: Final = 1 << 23
FRAME_BYTES: Final = 300
"""What a result may take beside its value: length, letter, the text of an error."""
CHUNK_BYTES: Final = 1 << 16


class Slot:
    """One zygote; runs one program at a time."""

    def __init__(self, helper: Helper) -> None:
        self.helper = helper
        self._content = bytearray()
        self._limit_bytes = 0
        self._ended: asyncio.Future[bytes | None] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(helper.result_fd, self._on_result)
        self._loop.add_reader(helper.report_fd, self._on_report)
        self._writer = _RequestWriter(helper.request_fd)
        self.is_broken = False

    async def run(self, request: bytes, limits: Limits, *, inputs: int) -> Report:
        """Run one program. Raises HelperGone when the zygote ends or is silent past the program's deadline."""
        self._content.clear()
        self._limit_bytes = inputs * (limits.result_bytes + FRAME_BYTES)
        ended: asyncio.Future[bytes | None] = self._loop.create_future()
        self._ended = ended
        backstop = self._loop.call_later(limits.wall_seconds + BACKSTOP_SECONDS, self._break, "its zygote is silent")
        started = time.monotonic()
        is_whole = False
        try:
            os.write(self.helper.control_fd, ORDER.pack(int(limits.wall_seconds * 1000), limits.cpu_seconds))
            self._writer.write(with_length(request))
            report = await ended
            is_whole = True
        except BrokenPipeError:
            raise HelperGone("the zygote has ended") from None
        finally:
            backstop.cancel()
            self._ended = None
            if not is_whole or report is None:
                self.close()
        return self._report(report, (time.monotonic() - started) * 1000)

    def close(self) -> None:
        """Kill the zygote and what it runs; a run in progress raises HelperGone."""
        if not self.is_broken:
            self.is_broken = True
            self._writer.stop()
            self._loop.remove_reader(self.helper.result_fd)
            self._loop.remove_reader(self.helper.report_fd)
            self.helper.kill()
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(HelperGone("the sandbox was closed"))

    def _report(self, report: bytes | None, wall_ms: float) -> Report:
        content = bytes(self._content)
        if report is None:
            return Report(
                content=b"", is_over_limit=True, was_killed=True, wait_status=0, cpu_seconds=0.0, wall_ms=wall_ms
            )
        was_killed, wait_status, user_us, system_us, _ = REPORT.unpack(report)
        if was_killed or wait_status != 0:
            self._writer.stop()
            _drain(self.helper.leftover_fd)
        return Report(
            content=content,
            is_over_limit=False,
            was_killed=bool(was_killed),
            wait_status=wait_status,
            cpu_seconds=(user_us + system_us) / 1e6,
            wall_ms=wall_ms,
        )

    def _on_result(self) -> None:
        try:
            chunk = os.read(self.helper.result_fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        if not chunk or self._ended is None:
            self._break("the zygote has ended" if not chunk else "somebody wrote a result that nobody asked for")
            return
        self._content += chunk
        if len(self._content) > self._limit_bytes and not self._ended.done():
            self._ended.set_result(None)

    def _on_report(self) -> None:
        try:
            report = os.read(self.helper.report_fd, REPORT.size)
        except BlockingIOError:
            return
        if len(report) != REPORT.size or self._ended is None:
            self._break("the zygote has ended")
            return
        # The child is gone, so all that it wrote is in the pipe already.
        while not self._ended.done():
            before = len(self._content)
            self._on_result()
            if len(self._content) == before:
                self._ended.set_result(report)

    def _break(self, reason: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(HelperGone(reason))
        elif self._ended is None:
            self.close()


class Parser:
    """One parser service; reads one program and its inputs at a time."""

    def __init__(self, helper: Helper) -> None:
        self.helper = helper
        self._content = bytearray()
        self._replied: asyncio.Future[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(helper.result_fd, self._on_reply)
        self._writer = _RequestWriter(helper.request_fd)
        self.is_broken = False

    async def parse(self, request: bytes) -> bytes:
        """The reply's content. Raises HelperGone when the parser ends, TimeoutError after `PARSE_SECONDS`."""
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


class _RequestWriter:
    """Writes whole requests into a pipe without ever blocking the loop."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = memoryview(b"")

    def write(self, content: bytes) -> None:
        self._rest = memoryview(content)
        self._go_on()
        if self._rest:
            asyncio.get_running_loop().add_writer(self._fd, self._go_on)

    def stop(self) -> None:
        """Give up what is not written yet."""
        if self._rest:
            self._rest = memoryview(b"")
            asyncio.get_running_loop().remove_writer(self._fd)

    def _go_on(self) -> None:
        try:
            self._rest = self._rest[os.write(self._fd, self._rest) :]
        except BlockingIOError:
            return
        if not self._rest:
            asyncio.get_running_loop().remove_writer(self._fd)


def _drain(fd: int) -> None:
    """Empty a pipe without waiting."""
    while select.select([fd], [], [], 0)[0]:
        os.read(fd, CHUNK_BYTES)
