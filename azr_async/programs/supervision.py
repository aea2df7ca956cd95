"""Keeps a set of programs: starts them, some of them again when they are lost, notices the first whose loss ends the
run, and leaves no process behind."""

import asyncio
import os
import signal
import time
from asyncio.subprocess import DEVNULL, Process
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, Literal

from azr_async.programs.fates import Deadlines, Ended, Loss, ProgramSpec, RunEnd, State

__all__ = ["Deadlines", "Ended", "Loss", "ProgramSpec", "RunEnd", "State", "Supervisor", "back_off"]

FIRST_BACK_OFF_SECONDS: Final = 1.0
LONGEST_BACK_OFF_SECONDS: Final = 60.0


class Supervisor:
    """Runs programs until the run is done, one fails, or the user wants to stop."""

    def __init__(
        self,
        specs: Sequence[ProgramSpec],
        deadlines: Deadlines,
        *,
        is_consequence: Callable[[str], bool] = lambda name: False,
        on_loss: Callable[[Loss], None] = lambda loss: None,
        on_removed: Callable[[Ended], None] = lambda ended: None,
    ) -> None:
        """`is_consequence` tells whether a failed program says that it fell because of another.

        `on_loss` is called when a program was lost that will be started again, `on_removed` when one has ended that was
        to be removed.
        """
        self.is_under_way = False
        """Set from outside once the run has shown that it works. Before, a program that fails by itself ends the run at
        once: it would fail again."""
        self._is_consequence, self._on_loss, self._on_removed = is_consequence, on_loss, on_removed
        self._losses: Counter[str] = Counter()
        self._resting: set[str] = set()
        self._is_winding_down = asyncio.Event()
        self._specs = list(specs)
        self._group = asyncio.TaskGroup()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._silent: set[str] = set()
        self._deadlines = deadlines
        self._processes: dict[str, Process] = {}
        self._ended: dict[str, Ended] = {}
        self._told: set[str] = set()
        self._heard: set[str] = set()
        self._stop_wishes = 0
        self._changed = asyncio.Event()

    def request_stop(self) -> None:
        """The user wants to stop: once for an orderly end, twice for an immediate one."""
        self._stop_wishes += 1
        self._changed.set()

    def heard_of(self, name: str) -> None:
        """A program has reported: it has started."""
        self._heard.add(name)
        self._changed.set()

    def is_silent(self, name: str) -> None:
        """A program has not answered for too long: it hangs, or was stopped. It is killed, which it cannot refuse.

        One that has not reported yet is not meant: it takes the place of the one that was silent.
        """
        process = self._processes.get(name)
        if name in self._heard and process is not None and process.returncode is None and name not in self._told:
            self._silent.add(name)
            _kill_group(process.pid)

    def add(self, spec: ProgramSpec) -> None:
        """One program more. The run was well without it, so it is a spare one."""
        spec = replace(spec, is_spare=True)
        self._specs.append(spec)
        self._keepers[spec.name] = self._group.create_task(self._keep(spec), name=spec.name)

    def remove(self, name: str) -> None:
        """One program less: it is told to end, after `stop_seconds` it is killed. The run does not end with it."""
        self._leaving.add(name)
        if name in self._resting:
            self._keepers[name].cancel()
            self._forget(name)
            return
        self._tell([name])  # one that is not there yet is told by `_run_once`

        def kill() -> None:
            process = self._processes.get(name)
            if process is not None and process.returncode is None:
                _kill_group(process.pid)

        asyncio.get_running_loop().call_later(self._deadlines.stop_seconds, kill)

    def states(self) -> dict[str, State]:
        """What each program is doing, by name."""
        return {spec.name: self._state(spec.name) for spec in self._specs}

    async def run(self) -> RunEnd:
        """Start everything, wait, and end everything. However this is left, no process of the run is alive."""
        async with self._group as group:
            self._keepers = {spec.name: group.create_task(self._keep(spec), name=spec.name) for spec in self._specs}
            try:
                kind, complaint = await self._decided()
                await self._wind_down(kind)
                killed = tuple(spec.name for spec in self._specs if spec.name not in self._gone())
                ended = tuple(sorted(self._ended.values(), key=lambda one: one.at_seconds))
            finally:
                for keeper in self._keepers.values():
                    keeper.cancel()
        return RunEnd(kind=kind, programs=ended, restarts=self._losses, complaint=complaint, killed=killed)

    async def _keep(self, spec: ProgramSpec) -> None:
        """Run a program to its end; while its loss can be borne again and again, each time after a longer rest."""
        while True:
            ended = await self._run_once(spec)
            is_leaving = spec.name in self._leaving
            if is_leaving or not self._is_started_again(spec, ended):
                if is_leaving or (spec.is_spare and self._goes_on() and self._has_another(spec.name)):
                    self._forget(spec.name)
                    self._on_removed(ended)
                else:
                    self._ended[spec.name] = ended
                    self._changed.set()
                return
            self._losses[spec.name] += 1
            self._resting.add(spec.name)
            loss = Loss(ended=ended, number=self._losses[spec.name], after_seconds=back_off(self._losses[spec.name]))
            self._on_loss(loss)
            with suppress(TimeoutError):
                async with asyncio.timeout(loss.after_seconds):
                    await self._is_winding_down.wait()
                    return
            self._resting.remove(spec.name)
            self._heard.discard(spec.name)
            self._silent.discard(spec.name)

    async def _run_once(self, spec: ProgramSpec) -> Ended:
        with spec.log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *spec.argv, stdin=DEVNULL, stdout=log, stderr=log, env=dict(spec.env), start_new_session=True
            )
        self._processes[spec.name] = process
        self._changed.set()
        if spec.name in self._leaving:
            self._tell([spec.name])
        try:
            status = await process.wait()
            return Ended(
                name=spec.name,
                status=status,
                at_seconds=time.monotonic(),
                was_told=spec.name in self._told,
                was_silent=spec.name in self._silent,
            )
        finally:
            _kill_group(process.pid)  # whatever it started dies with it
            await process.wait()  # short: SIGKILL cannot be refused

    def _forget(self, name: str) -> None:
        self._specs = [spec for spec in self._specs if spec.name != name]
        self._resting.discard(name)
        self._changed.set()

    def _is_started_again(self, spec: ProgramSpec, ended: Ended) -> bool:
        was_killed = ended.status < 0
        return (
            ended.status != 0
            and (was_killed or self.is_under_way)
            and self._losses[spec.name] < spec.max_restarts
            and not ended.was_told
            and self._goes_on()
        )

    def _goes_on(self) -> bool:
        return not self._stop_wishes and not self._is_winding_down.is_set()

    def _has_another(self, name: str) -> bool:
        """Is there, or comes again, one of its kind that nobody has told to leave?"""
        kind = name.rstrip("0123456789")
        return any(
            spec.name != name and spec.name.startswith(kind) and spec.name not in self._leaving | self._ended.keys()
            for spec in self._specs
        )

    def _gone(self) -> set[str]:
        """Programs that do not run and, once the run winds down, never will again."""
        return self._ended.keys() | self._resting

    async def _decided(self) -> tuple[Literal["done", "failed", "interrupted"], str]:
        names = {spec.name for spec in self._specs}
        try:
            async with asyncio.timeout(self._deadlines.start_seconds):
                await self._until(lambda: self._verdict() or names <= self._heard | self._ended.keys())
        except TimeoutError:
            return "failed", self._nothing_heard(names - self._heard - self._ended.keys())
        await self._until(lambda: self._verdict() or self._ended)
        # A program that ended well before the run did is either early by a moment or missing from now on.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._deadlines.stop_seconds):
                await self._until(self._verdict)
        verdict = self._verdict()
        return (verdict, "") if verdict else ("failed", f"{', '.join(self._ended)} ended while still needed.")

    def _verdict(self) -> Literal["done", "failed", "interrupted"] | None:
        if any(one.status != 0 for one in self._ended.values()):
            return "interrupted" if self._stop_wishes else "failed"
        if all(spec.name in self._ended for spec in self._specs if spec.ends_the_run):
            return "interrupted" if self._stop_wishes else "done"
        return "interrupted" if self._stop_wishes else None

    async def _wind_down(self, kind: str) -> None:
        self._is_winding_down.set()
        if kind == "failed":
            await self._cause_known(within_seconds=self._deadlines.grace_seconds)
        if kind == "interrupted":
            self._tell(spec.name for spec in self._specs if spec.is_told_to_stop)
            await self._all_ended(within_seconds=self._deadlines.stop_seconds, only_the_run=True)
        if kind != "failed" and self._stop_wishes < 2 and self._run_ended_well():
            await self._all_ended(within_seconds=self._deadlines.linger_seconds)
        if self._stop_wishes < 2:
            self._tell(spec.name for spec in self._specs)
            await self._all_ended(within_seconds=self._deadlines.grace_seconds)

    def _run_ended_well(self) -> bool:
        """Only then do the others learn from their channels that they may end."""
        decisive = [spec.name for spec in self._specs if spec.ends_the_run]
        return all(name in self._ended and self._ended[name].status == 0 for name in decisive)

    async def _all_ended(self, *, within_seconds: float, only_the_run: bool = False) -> None:
        names = {spec.name for spec in self._specs if spec.ends_the_run or not only_the_run}
        wishes = self._stop_wishes
        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                await self._until(lambda: names <= self._gone() or (self._stop_wishes > max(1, wishes)))

    async def _cause_known(self, *, within_seconds: float) -> None:
        """A program may notice that its peer is failing before the peer has ended; the peer is then the cause."""

        def knows() -> bool:
            failed = [one.name for one in self._ended.values() if one.status != 0]
            return not all(map(self._is_consequence, failed)) or not failed

        with suppress(TimeoutError):
            async with asyncio.timeout(within_seconds):
                await self._until(lambda: knows() or self._stop_wishes > 1)

    def _tell(self, names: Iterable[str]) -> None:
        for name in names:
            process = self._processes.get(name)
            if process is not None and process.returncode is None:
                self._told.add(name)
                with suppress(ProcessLookupError):
                    process.terminate()

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _state(self, name: str) -> State:
        if name in self._ended:
            return "ended" if self._ended[name].status == 0 else "failed"
        if name in self._leaving:
            return "leaving"
        if name in self._resting:
            return "restarting"
        return "running" if name in self._heard else "starting"

    def _nothing_heard(self, names: Iterable[str]) -> str:
        return (
            f"{', '.join(sorted(names))} did not report within {self._deadlines.start_seconds:g} s of its start. "
            "Look at its log; a slow disk or a large model may need a higher wires.start_seconds."
        )


def back_off(losses: int) -> float:
    """How long a program rests that was lost so often, in seconds."""
    return min(LONGEST_BACK_OFF_SECONDS, FIRST_BACK_OFF_SECONDS * 2.0 ** (losses - 1))


def _kill_group(leader_pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader_pid, signal.SIGKILL)
