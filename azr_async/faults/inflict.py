"""Doing a fault to a run that is going on."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from azr_async.algorithm.fault_schedule import ON_WIRES, Fault
from azr_async.faults.invariants import CHECKPOINTS, MANIFEST
from azr_async.faults.observer import JOURNAL
from azr_async.faults.processes import Running, limit_file_size, processes_of, send, send_all
from azr_async.faults.proxy import Action, Tampering
from azr_async.faults.views import Proxies, clock_trigger

MESSAGE_SECONDS: Final = 20.0
"""How long to wait for the message that is meant; some wires carry few."""
AIM_SECONDS: Final = 15.0
"""How long to wait until the run writes what is aimed at."""
LOOK_SECONDS: Final = 0.002

_ACTIONS: Final[dict[str, Action]] = {action: action for action in ("drop", "delay", "duplicate", "corrupt")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Where a run is, for whoever breaks it."""

    run_dir: Path
    folder: Path
    """What its programs do when they start, and their views of the wires."""
    proxies: Proxies


@dataclass(slots=True)
class Done:
    """What a fault has hit; empty: it found nothing to hit."""

    what: str = ""
    is_over: bool = False
    """What it did has been lifted again, if that can be."""
    pids: list[int] = field(default_factory=list)


async def inflict(fault: Fault, scene: Scene, done: Done) -> None:
    """Do it, and, where it lasts, lift it again; also when cancelled in between. `done` tells how far it has come."""
    how = _ON_WIRE if fault.kind in ON_WIRES else _HOW[fault.kind]
    await how(fault, scene, done)
    done.is_over = bool(done.what)


async def _kill(fault: Fault, scene: Scene, done: Done) -> None:
    for process in _targets(fault, scene):
        if send(process, signal.SIGKILL):
            done.what, done.pids = f"process {process.pid}", [process.pid]


async def _stop(fault: Fault, scene: Scene, done: Done) -> None:
    targets = [process for process in _targets(fault, scene) if send(process, signal.SIGSTOP)]
    if not targets:
        return
    done.what = f"for {fault.seconds:.1f} s"
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        send_all(targets, signal.SIGCONT)


async def _fill_disk(fault: Fault, scene: Scene, done: Done) -> None:
    targets = [process for process in _targets(fault, scene) if limit_file_size(process, fault.room_bytes)]
    if not targets:
        return
    done.what = f"files over {fault.room_bytes} bytes, for {fault.seconds:.1f} s"
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        for process in targets:
            limit_file_size(process, -1)


async def _move_clock(fault: Fault, scene: Scene, done: Done) -> None:
    if _targets(fault, scene):
        clock_trigger(scene.folder, fault.target).write_text(str(fault.seconds), encoding="ascii")
        done.what = f"by {fault.seconds / 3600:+.1f} h"


async def _kill_all(fault: Fault, scene: Scene, done: Done) -> None:
    seen = _BEING_WRITTEN[fault.aim](scene.run_dir) if fault.aim != "anywhere" else None
    if seen is not None:
        try:
            async with asyncio.timeout(AIM_SECONDS):
                while not seen():  # noqa: ASYNC110  files of others, and the moment is short
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            return
    everything = processes_of(scene.run_dir)
    send_all(everything, signal.SIGKILL)
    done.what, done.pids = f"{len(everything)} processes, aim: {fault.aim}", [process.pid for process in everything]


async def _tamper(fault: Fault, scene: Scene, done: Done) -> None:
    proxy = scene.proxies[fault.target]
    tampering = Tampering(
        _ACTIONS[fault.kind], part=fault.part, passed=fault.passed, seconds=fault.seconds, bit=fault.bit
    )
    proxy.arm(tampering)
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            hit = await asyncio.shield(tampering.hit)
    except TimeoutError:
        return
    finally:
        proxy.disarm()
    done.what = f"{fault.part}: {hit}" + (f", by {fault.seconds:.1f} s" if fault.kind == "delay" else "")
    await asyncio.sleep(fault.seconds)


def _targets(fault: Fault, scene: Scene) -> list[Running]:
    """One process; of several of a name, such as a sandbox's, the one that was started last."""
    found = [process for process in processes_of(scene.run_dir) if process.name == fault.target]
    return sorted(found, key=lambda process: process.started)[-1:]


def _checkpoint_being_written(run_dir: Path) -> Callable[[], bool]:
    folder = run_dir / CHECKPOINTS
    return lambda: any(not (path / MANIFEST).exists() for path in folder.glob("*")) or any(folder.glob(".*"))


def _journal_being_written(run_dir: Path) -> Callable[[], bool]:
    log = run_dir / f"{JOURNAL}-wal"

    def stamp() -> tuple[int, int]:
        try:
            status = log.stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    before = stamp()
    return lambda: stamp() != before


_BEING_WRITTEN: Final = {"checkpoint": _checkpoint_being_written, "journal": _journal_being_written}
_HOW: Final[dict[str, Callable[[Fault, Scene, Done], Awaitable[None]]]] = {
    "kill": _kill,
    "stop": _stop,
    "disk": _fill_disk,
    "clock": _move_clock,
    "group": _kill_all,
}
_ON_WIRE: Final = _tamper
