"""One sandboxed process as the pool sees it: hand it a request, get back what came of it. One request at a time.

A process that was interrupted in any way - cancelled, silent, over a limit - is broken: it is killed with all that it
runs, and never used again.
"""

import asyncio
import math
import os
import select
import time
from typing import Final

from azr_async.adapters.sandbox.helpers import Helper, HelperGone, NotBegun
from azr_async.adapters.sandbox.inside.wire import NO_FORK, ORDER, REPORT, with_length
from azr_async.adapters.sandbox.verdicts import Limits, Report

BACKSTOP_SECONDS: Final = 3.0
"""What a zygote gets beyond a program's wall limit to kill it and to report."""
FRAME_BYTES: Final = 300
"""What a result may take beside its value: length, letter, the text of an error."""
CHUNK_BYTES: Final = 1 << 16
SHORT_WALL_SECONDS: Final = 0.1
"""Within a shorter limit a waiting child need not even have woken up: then it is the limit's doing."""


class Slot:
    """One zygote; runs one program at a time."""

    def __init__(self, helper: Helper) -> None:
        self.helper = helper
        self._content = bytearray()
        self._limit_bytes = 0
        self._ended: asyncio.Future[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(helper.report_fd, self._on_report)
        self._writer = RequestWriter(helper.request_fd)
        self.is_broken = False

    async def run(self, request: bytes, limits: Limits, *, inputs: int) -> Report:
        """Run one program. Raises HelperGone when the zygote ends or is silent past the program's deadline.

        NotBegun when the child that waited for it has died, or none could be forked.
        """
        self._content.clear()
        self._limit_bytes = inputs * (limits.result_bytes + FRAME_BYTES)
        # What fits into the pipe is read at the end, at once: one waking-up of this process less.
        must_read_on_the_way = self._limit_bytes > self.helper.result_pipe_bytes
        ended: asyncio.Future[bytes] = self._loop.create_future()
        self._ended = ended
        backstop = self._loop.call_later(limits.wall_seconds + BACKSTOP_SECONDS, self._break, "its zygote is silent")
        started = time.monotonic()
        report = b""
        try:
            if must_read_on_the_way:
                self._loop.add_reader(self.helper.result_fd, self._read_result)
            # The request first: the child need not wait until its zygote has woken up.
            self._writer.write(with_length(request))
            os.write(self.helper.control_fd, ORDER.pack(math.ceil(limits.wall_seconds * 1000)))
            report = await ended
            reason = self._why_not_begun(report, 4 + len(request), limits)
            if reason:
                report = b""
                raise NotBegun(reason)
        except BrokenPipeError:
            raise HelperGone("the zygote has ended") from None
        finally:
            backstop.cancel()
            self._ended = None
            if must_read_on_the_way:
                self._loop.remove_reader(self.helper.result_fd)
            if not report:
                self.close()
        return self._report(report, (time.monotonic() - started) * 1000)

    def close(self) -> None:
        """Kill the zygote and what it runs; a run in progress raises HelperGone."""
        if not self.is_broken:
            self.is_broken = True
            self._writer.stop()
            self._loop.remove_reader(self.helper.report_fd)
            self._loop.remove_reader(self.helper.result_fd)
            self.helper.kill()
        self._break("the sandbox was closed")

    def _why_not_begun(self, report: bytes, request_bytes: int, limits: Limits) -> str:
        """Why nobody has read the request; empty if somebody has, or if the limit was too short for it.

        Where there was a child, the pipe of requests is empty again; where none could be forked, the zygote has ended.
        """
        was_killed, status, *_ = REPORT.unpack(report)
        if was_killed == NO_FORK:
            return f"no process can be forked ({os.strerror(status)})"
        is_unread = self._clear_away(report) == request_bytes
        if not is_unread or (was_killed and limits.wall_seconds < SHORT_WALL_SECONDS):
            return ""
        return "the child died before it had read its request"  # for want of memory while it waited, perhaps

    def _clear_away(self, report: bytes) -> int:
        """What a child that did not end well has left of its request, in bytes. The next child finds the pipe empty."""
        was_killed, wait_status, *_ = REPORT.unpack(report)
        return self._writer.stop() + _drain(self.helper.leftover_fd) if was_killed or wait_status != 0 else 0

    def _report(self, report: bytes, wall_ms: float) -> Report:
        was_killed, wait_status, user_us, system_us, peak_kib = REPORT.unpack(report)
        return Report(
            content=bytes(self._content),
            is_over_limit=len(self._content) > self._limit_bytes,
            was_killed=bool(was_killed),
            wait_status=wait_status,
            cpu_seconds=(user_us + system_us) / 1e6,
            peak_kib=peak_kib,
            wall_ms=wall_ms,
        )

    def _read_result(self) -> int:
        """Take one chunk; its size. What floods the pipe is left there, and its writer waits for its deadline."""
        try:
            chunk = os.read(self.helper.result_fd, CHUNK_BYTES)
        except BlockingIOError:
            return 0
        self._content += chunk
        if len(self._content) > self._limit_bytes:
            self._loop.remove_reader(self.helper.result_fd)
        return len(chunk)

    def _on_report(self) -> None:
        try:
            report = os.read(self.helper.report_fd, REPORT.size)
        except BlockingIOError:
            return
        if len(report) != REPORT.size or self._ended is None:
            self._break("the zygote has ended")
        elif not self._ended.done():
            # The child is gone, so all that it wrote is in the pipe.
            while self._read_result() == CHUNK_BYTES:
                pass
            self._ended.set_result(report)

    def _break(self, reason: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(HelperGone(reason))
        elif self._ended is None and not self.is_broken:
            self.close()


class RequestWriter:
    """Writes whole requests into a pipe without ever blocking the loop."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = memoryview(b"")

    def write(self, content: bytes) -> None:
        self._rest = memoryview(content)
        self._go_on()
        if self._rest:
            asyncio.get_running_loop().add_writer(self._fd, self._go_on)

    def stop(self) -> int:
        """Give up what is not written yet; its bytes."""
        unwritten = len(self._rest)
        if unwritten:
            self._rest = memoryview(b"")
            asyncio.get_running_loop().remove_writer(self._fd)
        return unwritten

    def _go_on(self) -> None:
        try:
            self._rest = self._rest[os.write(self._fd, self._rest) :]
        except BlockingIOError:
            return
        if not self._rest:
            asyncio.get_running_loop().remove_writer(self._fd)


def _drain(fd: int) -> int:
    """Empty a pipe without waiting; how many bytes it held."""
    drained = 0
    ready = select.poll()  # `select` knows no descriptor beyond 1023
    ready.register(fd, select.POLLIN)
    while ready.poll(0):
        drained += len(os.read(fd, CHUNK_BYTES))
    return drained
