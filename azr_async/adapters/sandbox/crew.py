"""The sandboxed processes of a pool: zygotes of both flavours, parsers, and the proof that they hold."""

import asyncio
import json
from functools import partial
from typing import Final, Literal

from azr_async.adapters.sandbox.helpers import Helper, HelperGone, HelperSettings, Role, start_helper
from azr_async.adapters.sandbox.inside.canaries import CANARIES, CANARY
from azr_async.adapters.sandbox.inside.wire import split_parts, with_length
from azr_async.adapters.sandbox.lanes import Lane
from azr_async.adapters.sandbox.meter import Meter
from azr_async.adapters.sandbox.parsing import Parser, ParsingDesk
from azr_async.adapters.sandbox.slots import Slot
from azr_async.adapters.sandbox.verdicts import Limits, Report
from azr_async.errors import SandboxError

Require = Literal["strict", "best-effort"]

SPARE_SLOTS: Final = 10
"""Zygotes beyond `workers`, for programs that take long, so that they delay no other."""
STRAGGLER_SECONDS: Final = 0.2
PARSERS: Final = 2
ATTEMPTS: Final = 3
"""How often a request is handed to another process when one dies under it."""
WALL: Final = ("seccomp", "no_new_privs", "rlimits")
"""Layers without which a program could get out; the others stand behind them."""
CANARY_WALL_SECONDS: Final = 0.2

LOST: Final = Report(content=b"", is_over_limit=False, was_killed=False, wait_status=256, cpu_seconds=0.0, wall_ms=0.0)


class Crew:
    """Starts, uses and ends the processes. `layers` says what was found to isolate them."""

    def __init__(self, settings: HelperSettings, limits: Limits, *, workers: int, require: Require) -> None:
        self.meter = Meter()
        self.layers: dict[str, str] = {}
        self._settings = settings
        self._limits = limits
        self._workers = workers
        self._require = require
        self._permits = asyncio.Semaphore(workers)
        self._lanes = [Lane(partial(self._start_slot, flavour), most=workers + SPARE_SLOTS) for flavour in (0, 1)]
        self._parsers = Lane(self._start_parser, most=PARSERS)
        self._desk = ParsingDesk(self._parsers)

    async def open(self) -> None:
        """Start the processes that are needed at once. Raises SandboxError, with nothing left behind."""
        try:
            async with asyncio.TaskGroup() as starts:
                self._parsers.open(starts, 1)
                self._lanes[0].open(starts, self._workers)
                self._lanes[1].open(starts, 1)
            await self._release_canaries()
        except ExceptionGroup as failures:
            self.close()
            raise failures.exceptions[0] from None
        except SandboxError:
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

    async def parse(self, mode: str, program: str | None, inputs: list[str]) -> list[bytes]:
        """One part for the program, unless it is None, and one for each input (inside/parser.py)."""
        answer = await self._desk.parse(json.dumps([mode, program, inputs]))
        if answer is None:
            return [b"Eit cannot be parsed within limits"] * (len(inputs) + (program is not None))
        return list(split_parts(answer))

    async def fork(self, flavour: int, code: bytes, arguments: list[bytes]) -> Report:
        """Run compiled code on `arguments` in one fork of a zygote of `flavour`."""
        request = b"".join(map(with_length, [code, *arguments]))
        for _ in range(ATTEMPTS):
            with self.meter.queued():
                await self._permits.acquire()
            permit = _Permit(self._permits)
            try:
                async with self._lanes[flavour].member() as slot:
                    permit.expire_in(STRAGGLER_SECONDS)
                    with self.meter.running():
                        report = await slot.run(request, self._limits, inputs=len(arguments))
                    self.meter.kills += report.was_killed
                    return report
            except HelperGone:
                continue
            finally:
                permit.release()
        return LOST

    async def _start_slot(self, flavour: int) -> Slot:
        return Slot(await self._start("zygote", flavour))

    async def _start_parser(self) -> Parser:
        return Parser(await self._start("parser", 0))

    async def _start(self, role: Role, flavour: int) -> Helper:
        helper = await start_helper(role, self._settings, flavour=flavour)
        missing = [f"{layer} ({helper.layers[layer]})" for layer in WALL if not _is_verified(helper.layers[layer])]
        if missing and self._require == "strict":
            helper.kill()
            raise SandboxError(_refusal(f"this host does not offer {', '.join(missing)}"))
        # What one process lacks is what the sandbox lacks.
        for layer, state in helper.layers.items():
            if _is_verified(self.layers.get(layer, "verified")):
                self.layers[layer] = state
        return helper

    async def _release_canaries(self) -> None:
        """Try to get out by every way known."""
        escaped = []
        limits = Limits(wall_seconds=CANARY_WALL_SECONDS, cpu_seconds=1, result_bytes=100)
        for name in CANARIES:
            try:
                async with self._lanes[0].member() as slot:
                    report = await slot.run(with_length(CANARY + name.encode()), limits, inputs=1)
            except HelperGone:
                escaped.append(f"{name} and end its zygote")
                continue
            if b"escaped" in report.content:
                escaped.append(name)
        if escaped and self._require == "strict":
            raise SandboxError(_refusal(f"a program could {', '.join(escaped)}"))
        held = f"{len(CANARIES) - len(escaped)} of {len(CANARIES)} held"
        self.layers["canaries"] = f"verified {held}" if not escaped else f"escaped: {', '.join(escaped)}; {held}"


class _Permit:
    """The right to compute, handed on when the program ends or has taken long."""

    def __init__(self, permits: asyncio.Semaphore) -> None:
        self._permits = permits
        self._is_held = True
        self._timer: asyncio.TimerHandle | None = None

    def expire_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.release)

    def release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._is_held:
            self._is_held = False
            self._permits.release()


def _is_verified(state: str) -> bool:
    return state.startswith("verified")


def _refusal(problem: str) -> str:
    return (
        f"the sandbox would not hold: {problem}. It needs a kernel with seccomp filters, on x86_64 or aarch64. In "
        "Docker leave the default seccomp profile on (or add --security-opt seccomp=unconfined); in Kubernetes set "
        "securityContext.seccompProfile.type to RuntimeDefault. To run model-written programs without this wall, set "
        "sandbox.require to best-effort."
    )
