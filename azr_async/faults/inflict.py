"""Doing a fault to a run that is going on."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from azr_async.algorithm.fault_schedule import ON_WIRES, Fault
from azr_async.faults.invariants import CHECKPOINTS
from azr_async.faults.observer import JOURNAL
from azr_async.faults.processes import Running, limit_file_size, processes_of, send, send_all
from azr_async.faults.proxy import Action, Tampering
from azr_async.faults.views import Proxies, clock_trigger

MESSAGE_SECONDS: Final = 20.0
"""How long to wait for the message that is meant; some wires carry few."""
AIM_SECONDS: Final = 15.0
"""How long to wait until the run writes what is aimed at."""
LOOK_SECONDS: Final = 0.002

DRAFTS: Final = ".step-*.writing"
"""Folders of checkpoints that are not whole yet."""

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


async def inflict(fault: Fault, scene: Scene, done: Done) -> None:
    """Do it, and, where it lasts, lift it again; also when cancelled in between. `done` tells how far it has come."""
    how = _tamper if fault.kind in ON_WIRES else _HOW[fault.kind]
    await how(fault, scene, done)


async def _kill(fault: Fault, scene: Scene, done: Done) -> None:
    for process in _targets(fault, scene):
        if send(process, signal.SIGKILL):
            done.what = f"process {process.pid}"


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
    if fault.aim != "anywhere" and not await _is_being_written(_BEING_WRITTEN[fault.aim], scene.run_dir):
        return
    everything = processes_of(scene.run_dir)
    send_all(everything, signal.SIGKILL)
    done.what = f"{len(everything)} processes, aim: {fault.aim}"


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


async def _is_being_written(files: Callable[[Path], list[Path]], run_dir: Path) -> bool:
    """Wait for the moment. What a run has left behind, killed earlier, does not change and is not it."""
    before = _stamps(files(run_dir))
    try:
        async with asyncio.timeout(AIM_SECONDS):
            while not _stamps(files(run_dir)).items() - before.items():  # noqa: ASYNC110  files of others
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        return False
    return True


def _drafts(run_dir: Path) -> list[Path]:
    return list((run_dir / CHECKPOINTS).glob(DRAFTS))


def _journal_log(run_dir: Path) -> list[Path]:
    return [run_dir / f"{JOURNAL}-wal"]


def _stamps(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of each that is there."""
    found = {}
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


_BEING_WRITTEN: Final[dict[str, Callable[[Path], list[Path]]]] = {"checkpoint": _drafts, "journal": _journal_log}
_HOW: Final[dict[str, Callable[[Fault, Scene, Done], Awaitable[None]]]] = {
    "kill": _kill,
    "stop": _stop,
    "disk": _fill_disk,
    "clock": _move_clock,
    "group": _kill_all,
}
