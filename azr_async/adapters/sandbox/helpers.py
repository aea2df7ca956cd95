"""Starting and ending the sandboxed processes: exec with an empty environment, pipes, a ready message, SIGKILL."""

import asyncio
import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from azr_async.errors import SandboxError

ROOT: Final = Path(__file__).parents[3]
START_SECONDS: Final = 30.0
KILL_SECONDS: Final = 1.0
"""A killed process is gone within milliseconds; one that the kernel holds back is left to it."""
PIPE_BYTES: Final = 1 << 20
_BOOTSTRAP: Final = (
    "import sys; sys.path.append(sys.argv[1]); from azr_async.adapters.sandbox.inside.start import main; main()"
)
_PYTHON_OPTIONS: Final = ("-s", "-P", "-S", "-B", "-W", "ignore", "-X", "utf8")
_F_SETPIPE_SZ: Final = 1031

Role = Literal["zygote", "parser"]


class HelperGone(Exception):
    """The sandboxed process ended, or does not answer; whoever asked starts another one."""


class NotBegun(HelperGone):
    """No child has read the program: it died before, or none could be forked. That says nothing about the program."""


class HelperKilled(HelperGone):
    """The sandboxed process was killed, and not by the pool."""


class StartFailed(SandboxError):
    """A sandboxed process did not come up. That may be different in a moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HelperSettings:
    """What every sandboxed process of a pool is told."""

    allowed_imports: Sequence[str]
    memory_mb: int
    cpu_seconds: int
    result_bytes: int
    is_gated: bool
    """False: programs may use all of Python, and the walls alone hold them."""
    label: str
    """Stands in the command line, so that `ps` shows to what the process belongs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Helper:
    """A running sandboxed process and the pool's ends of its pipes."""

    process: subprocess.Popen[bytes]
    result_fd: int
    """Read, non-blocking."""
    result_pipe_bytes: int
    """What the pipe of results surely holds; 0 if that is not known."""
    request_fd: int
    """Write, non-blocking."""
    leftover_fd: int
    """The read end of the request pipe, to empty it after a child that died before it had read everything."""
    control_fd: int
    report_fd: int
    layers: dict[str, str]
    open_fds: list[int]
    """All of the above, until they are closed."""

    def ended_by_kill(self) -> bool:
        """Of a process that has hung up by itself: whether SIGKILL has ended it, for want of memory perhaps.

        One that is not gone within `KILL_SECONDS` counts as killed: whoever ends by himself is gone at once, but taking
        a killed one down may last where memory is short.
        """
        with suppress(subprocess.TimeoutExpired):
            # Where it is the first of a PID namespace, the one that waits for it passes the number on.
            return self.process.wait(KILL_SECONDS) in (-signal.SIGKILL, -signal.SIGKILL & 0xFF)
        return True

    def strike(self) -> None:
        """Begin to `kill`, without waiting for the end."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the process and all that it started, now. Safe to call twice, and after it has ended by itself."""
        if not self.open_fds:
            return
        self.strike()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        # Its own children are not ours to wait for; but the last of them to end hangs up the pipe of results.
        last = select.poll()
        last.register(self.result_fd, 0)
        last.poll(KILL_SECONDS * 1000)
        while self.open_fds:
            os.close(self.open_fds.pop())


async def start_helper(role: Role, settings: HelperSettings, *, flavour: int = 0) -> Helper:
    """Start a sandboxed process and wait until it has confined itself.

    Raises StartFailed when it does not come up within `START_SECONDS`.
    """
    helper = _launch(role, settings, flavour)
    try:
        helper.layers.update(await _read_ready_message(helper, role))
    finally:
        if not helper.layers:
            helper.kill()
    return helper


def _launch(role: Role, settings: HelperSettings, flavour: int) -> Helper:
    fds: list[int] = []
    try:
        for _ in range(4):
            fds += os.pipe()
        result_read, result_write, request_read, request_write, control_read, control_write, *report = fds
        result_pipe_bytes = _enlarge(result_read)
        _enlarge(request_write)
        process = _execute(role, settings, flavour, [result_write, request_read, control_read, report[1]])
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise StartFailed(_hint(role, error)) from None
    for fd in (result_write, control_read, report[1]):
        os.close(fd)
    for fd in (result_read, request_write, control_write, report[0]):
        os.set_blocking(fd, False)
    return Helper(
        process=process,
        result_fd=result_read,
        result_pipe_bytes=result_pipe_bytes,
        request_fd=request_write,
        leftover_fd=request_read,
        control_fd=control_write,
        report_fd=report[0],
        layers={},
        open_fds=[result_read, request_write, request_read, control_write, report[0]],
    )


def no_room(role: str, reason: str) -> str:
    """What to say where a process or memory is wanting."""
    return (
        f"the sandbox's {role} cannot be started: {reason}. Are this user's processes or the memory used up "
        "(`ulimit -u`, `free`)? Lower sandbox.workers."
    )


def _hint(role: Role, error: OSError) -> str:
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            advice = "Raise the limit of open files (`ulimit -n`) or lower sandbox.workers."
        case errno.EAGAIN | errno.ENOMEM:
            return no_room(role, str(error.strerror))
        case _:
            advice = f"Can this user execute {_python()}, and read the installation that it belongs to?"
    return f"the sandbox's {role} cannot be started ({error.strerror}). {advice}"


def _python() -> str:
    """The venv's interpreter would need the venv's files; the real one needs its standard library only."""
    return os.path.realpath(sys.executable)


def _execute(role: Role, settings: HelperSettings, flavour: int, fds: list[int]) -> subprocess.Popen[bytes]:
    options = {
        "allowed_imports": list(settings.allowed_imports),
        "memory_mb": settings.memory_mb,
        "cpu_seconds": settings.cpu_seconds,
        "result_bytes": settings.result_bytes,
        "is_gated": settings.is_gated,
        "flavour": flavour,
        "fds": fds,
        "parent": os.getpid(),
    }
    return subprocess.Popen(
        [_python(), *_PYTHON_OPTIONS, "-c", _BOOTSTRAP, str(ROOT), role, json.dumps(options), settings.label],
        # Each process has hashes of its own: a dependence that one pair of them does not show, the next one does.
        env={"PYTHONHASHSEED": str(int.from_bytes(os.urandom(4))), "LANG": "C.UTF-8"},
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def _enlarge(fd: int) -> int:
    """Make room for a whole request or result, so that nobody waits for the other end; how many bytes fit now.

    Refused to users with many pipes, and by kernels that do not know it.
    """
    with suppress(OSError):
        return fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)
    return 0


async def _read_ready_message(helper: Helper, role: Role) -> dict[str, str]:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    content = b""
    loop.add_reader(helper.result_fd, readable.set)
    try:
        async with asyncio.timeout(START_SECONDS):
            while len(content) < 4 or len(content) < 4 + int.from_bytes(content[:4], "little"):
                await readable.wait()
                readable.clear()
                chunk = os.read(helper.result_fd, 65536)
                if not chunk:
                    raise StartFailed(
                        f"the sandbox's {role} ended before it was ready (exit status {helper.process.poll()}). "
                        "Run `python -m azr_async execute --explain` to see which isolation layers this host refuses."
                    )
                content += chunk
    except TimeoutError:
        raise StartFailed(
            f"the sandbox's {role} (process {helper.process.pid}) was not ready within {START_SECONDS} s. "
            "Is the machine out of memory or badly overloaded? Lower sandbox.workers."
        ) from None
    finally:
        loop.remove_reader(helper.result_fd)
    layers: dict[str, str] = json.loads(content[4:])
    if "no_fork" in layers:
        raise StartFailed(no_room(role, f"no process can be forked ({layers['no_fork']})"))
    if "failed" in layers:
        raise StartFailed(
            f"the sandbox's {role} could not start: {layers['failed']}. If it names a module, take it out of "
            "sandbox.allowed_imports; otherwise run `python -m azr_async execute --explain`."
        )
    return layers
