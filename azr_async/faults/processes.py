"""The processes of a run, as /proc shows them: every one has the run's folder in its command line."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from azr_async.algorithm.fault_schedule import SANDBOX
from azr_async.faults.inside import program_of

PROC: Final = Path("/proc")
LAUNCHER: Final = "launcher"
LAUNCHER_MODULE: Final = "azr_async.programs.fault_start"
LOOK_SECONDS: Final = 0.05
GONE: Final = ("Z", "X")
"""States of processes that only their parents still know of."""


@dataclass(frozen=True, slots=True)
class Running:
    """A process that is alive. Its number alone may be another one's tomorrow."""

    pid: int
    started: int
    """In the kernel's ticks since boot."""
    name: str
    """`launcher`, `inference-0`, `selfplay`, `learner-0`, `zygote`, `parser`; empty: something else of the run."""


def processes_of(run_dir: Path) -> list[Running]:
    """All that is alive of a run."""
    return [
        Running(pid, started, _name(command))
        for pid, command in _commands()
        if str(run_dir) in command and (started := _started(pid)) is not None
    ]


def is_alive(process: Running) -> bool:
    """Is it still the same process?"""
    return _started(process.pid) == process.started


def send(process: Running, number: signal.Signals) -> bool:
    """Signal it, if it is still there."""
    if not is_alive(process):
        return False
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
        return True
    return False


def send_all(processes: Iterable[Running], number: signal.Signals) -> None:
    """Signal them all, as fast as can be."""
    for process in processes:
        send(process, number)


def limit_file_size(process: Running, limit_bytes: int) -> bool:
    """As on a full disk: writing past that size fails, in all files. Below 0: no limit."""
    if not is_alive(process):
        return False
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        soft = hard if limit_bytes < 0 else limit_bytes
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        return True
    return False


async def wait_until_gone(run_dir: Path, *, within_seconds: float) -> list[Running]:
    """What is still alive of a run after that time."""
    end = time.monotonic() + within_seconds
    while (left := processes_of(run_dir)) and time.monotonic() < end:  # noqa: ASYNC110  processes of others
        await asyncio.sleep(LOOK_SECONDS)
    return left


def _commands() -> Iterator[tuple[int, list[str]]]:
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                yield int(folder.name), words


def _name(command: list[str]) -> str:
    if LAUNCHER_MODULE in command:
        return LAUNCHER
    return program_of(command) or next((role for role in SANDBOX if role in command), "")


def _started(pid: int) -> int | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in GONE else int(fields[18])
