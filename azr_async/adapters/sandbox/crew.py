"""The sandboxed processes of a pool: zygotes of both flavours, parsers, and the proof that they hold."""

import asyncio
from functools import partial
from typing import Final, Literal

from azr_async.adapters.sandbox.helpers import (
    Helper,
    HelperGone,
    HelperSettings,
    NotBegun,
    Role,
    StartFailed,
    no_room,
    start_helper,
)
from azr_async.adapters.sandbox.inside.canaries import CANARIES, CANARY
from azr_async.adapters.sandbox.inside.wire import with_length
from azr_async.adapters.sandbox.lanes import Lane
from azr_async.adapters.sandbox.meter import Meter
from azr_async.adapters.sandbox.parsing import Parser, ParsingDesk
from azr_async.adapters.sandbox.permits import Permit
from azr_async.adapters.sandbox.slots import Slot
from azr_async.adapters.sandbox.verdicts import Limits, Report
from azr_async.errors import SandboxError

Require = Literal["strict", "best-effort"]

SPARE_SLOTS: Final = 10
"""Zygotes beyond `workers`, for programs that take long, so that they delay no other."""
STRAGGLER_SECONDS: Final = 0.2
FLAVOURS: Final = 5
"""Lanes for runs that must agree. The last three are for doubtful programs, once the first two runs have agreed."""
PARSERS: Final = 2
SPARE_PARSERS: Final = 4
ATTEMPTS: Final = 3
"""How often a request is handed to another process when one dies under it."""
WALL: Final = ("seccomp", "no_new_privs", "rlimits")
"""Layers without which a program could get out; the others stand behind them."""
CANARY_WALL_SECONDS: Final = 0.2
CANARY_LIMITS: Final = Limits(wall_seconds=CANARY_WALL_SECONDS, cpu_seconds=1, result_bytes=100, memory_mb=1)


class Crew:
    """Starts, uses and ends the processes. `layers` says what was found to isolate them."""

    def __init__(self, settings: HelperSettings, limits: Limits, *, workers: int, require: Require) -> None:
        self.meter = Meter()
        self.layers: dict[str, str] = {}
        self.weakness = ""
        self._settings = settings
        self._limits = limits
        self._workers = workers
        self._require = require
        self._permits = asyncio.Semaphore(workers)
        self._lanes = [
            Lane(partial(self._start_slot, flavour), most=workers + (SPARE_SLOTS if flavour < 2 else 0))
            for flavour in range(FLAVOURS)
        ]
        self._parsers = Lane(self._start_parser, most=PARSERS + SPARE_PARSERS)
        self._desk = ParsingDesk(self._parsers, together=PARSERS)

    async def open(self) -> None:
        """Start the processes that are needed at once. Raises SandboxError, with nothing left behind."""
        try:
            async with asyncio.TaskGroup() as starts:
                self._parsers.open(starts, 1)
                # While one forks its next child, another one works.
                self._lanes[0].open(starts, self._workers + 1)
                self._lanes[1].open(starts, 1)
            await self._release_canaries()
        except ExceptionGroup as failures:
            self.close()
            raise failures.exceptions[0] from None
        except BaseException:  # cancelled, too: what has been started must not stay
            self.close()
            raise

    def close(self) -> None:
        """Kill every process. Requests in progress raise SandboxError."""
        for lane in self._lanes:
            lane.close()
        self._parsers.close()

    @property
    def restarts(self) -> int:
        """Processes that had to be replaced, so far."""
        return sum(lane.restarts for lane in self._lanes) + self._parsers.restarts

    @property
    def is_walled(self) -> bool:
        """Whether the filter holds programs: then none of them can send a signal, not even to itself."""
        return _is_verified(self.layers["seccomp"])

    async def parse(self, mode: str, program: str | None, inputs: list[str]) -> list[bytes]:
        """As `ParsingDesk.parse`."""
        return await self._desk.parse(mode, program, inputs)

    async def fork(self, flavour: int, code: bytes, arguments: list[bytes]) -> Report | str:
        """Run compiled code on `arguments` in one fork of a zygote of `flavour`.

        A text if there was no process for it: why not, the last time. It is tried `ATTEMPTS` times where zygotes die or
        are silent, and `workers + SPARE_SLOTS` times where no child has begun.
        """
        request = b"".join(map(with_length, [code, *arguments]))
        attempts_left, vain_left, reason = ATTEMPTS, self._workers + SPARE_SLOTS, ""
        while attempts_left and vain_left:
            with self.meter.queued():
                await self._permits.acquire()
            permit = Permit(self._permits)
            try:
                async with self._lanes[flavour % FLAVOURS].member() as slot:
                    permit.expire_in(STRAGGLER_SECONDS)
                    with self.meter.running():
                        report = await slot.run(request, self._limits, inputs=len(arguments))
                    self.meter.kills += report.was_forced
                    return report
            except NotBegun as error:  # when memory is short, waiting children may die by the dozen
                vain_left, reason = vain_left - 1, str(error)
            except HelperGone as error:
                attempts_left, reason = attempts_left - 1, str(error)
            finally:
                permit.release()
        return reason

    async def _start_slot(self, flavour: int) -> Slot:
        return Slot(await self._start("zygote", flavour))

    async def _start_parser(self) -> Parser:
        return Parser(await self._start("parser", 0))

    async def _start(self, role: Role, flavour: int) -> Helper:
        helper = await start_helper(role, self._settings, flavour=flavour)
        missing = [f"{layer} ({helper.layers[layer]})" for layer in WALL if not _is_verified(helper.layers[layer])]
        if missing:
            try:
                self._refuse(f"this host does not offer {', '.join(missing)}")
            except SandboxError:
                helper.kill()
                raise
        # What one process lacks is what the sandbox lacks.
        for layer, state in helper.layers.items():
            if _is_verified(self.layers.get(layer, "verified")):
                self.layers[layer] = state
        return helper

    async def _release_canaries(self) -> None:
        """Try to get out by every way known."""
        escaped = []
        for name in CANARIES:
            try:
                if b"escaped" in await self._release(name):
                    escaped.append(name)
            except HelperGone:
                escaped.append(f"{name} and end its zygote")
        if escaped:
            self._refuse(f"a program could {', '.join(escaped)}")
        held = f"{len(CANARIES) - len(escaped)} of {len(CANARIES)} held"
        self.layers["canaries"] = f"verified {held}" if not escaped else f"escaped: {', '.join(escaped)}; {held}"

    async def _release(self, name: str) -> bytes:
        """What one canary wrote.

        Raises StartFailed when its process cannot be had, HelperGone when its zygote ends every time: once, or silent
        once, it may have been for want of memory or time.
        """
        attempts_left = ATTEMPTS
        while True:
            try:
                async with self._lanes[0].member() as slot:
                    return (await slot.run(with_length(CANARY + name.encode()), CANARY_LIMITS, inputs=1)).content
            except HelperGone as error:
                attempts_left -= 1
                if attempts_left:
                    continue
                if isinstance(error, NotBegun):  # it says nothing about the canary
                    raise StartFailed(no_room("zygote", str(error))) from None
                raise

    def _refuse(self, problem: str) -> None:
        """Refuse to go on, if that is what was asked for; otherwise only say so."""
        if self._require == "strict":
            raise SandboxError(_refusal(problem))
        self.weakness = f"the sandbox does not hold: {problem}. Model-written programs run here all the same."


def _is_verified(state: str) -> bool:
    return state.startswith("verified")


def _refusal(problem: str) -> str:
    return (
        f"the sandbox would not hold: {problem}. It needs a kernel with seccomp filters, on x86_64 or aarch64. In "
        "Docker leave the default seccomp profile on (or add --security-opt seccomp=unconfined); in Kubernetes set "
        "securityContext.seccompProfile.type to RuntimeDefault. To run model-written programs without this wall, set "
        "sandbox.require (--require of the tools) to best-effort."
    )
