"""The sandbox that self-play uses: many untrusted programs in flight, none of them trusted with anything."""

import math
from collections.abc import Sequence
from typing import Final, Literal, Self

from azr_async.adapters.sandbox.crew import Crew, Require
from azr_async.adapters.sandbox.helpers import HelperSettings
from azr_async.adapters.sandbox.meter import Meter
from azr_async.adapters.sandbox.recent import Recent
from azr_async.adapters.sandbox.verdicts import Limits, agreed, outcomes_of
from azr_async.algorithm.values import read
from azr_async.messages import Outcome, Status

_COMPUTING_MODULES: Final = """
    __future__ abc array base64 binascii bisect cmath collections collections.abc contextlib copy dataclasses decimal
    difflib enum fractions functools graphlib heapq itertools json keyword math numbers operator pprint re reprlib
    statistics string struct textwrap types typing unicodedata zlib
"""
DEFAULT_IMPORTS: Final = tuple(_COMPUTING_MODULES.split())
"""Modules that compute and nothing else: no clock, no chance, no file, no thread."""

SOURCE_CHARACTERS: Final = 65_536
INPUTS_PER_FORK: Final = 64

InputMode = Literal["literal", "expression"]


class SandboxPool:
    """`ports.Sandbox` on this machine. Use it as `async with SandboxPool(...) as sandbox`.

    Args:
        workers: programs that compute side by side; programs that take long do not count.
        wall_seconds: limit of one program on one input.
        cpu_seconds: the same for CPU time, rounded up to whole seconds, since the kernel counts so.
        memory_mb: address space that a program may add.
        allowed_imports: modules that a program may import.
        result_bytes: longest encoded value that a program may return.
        cache_entries: verdicts that are remembered.
        label: stands in the command line of every process of the sandbox.
        require: `strict` refuses to start where a program could get out; `best-effort` starts and tells, in `layers`.
        is_gated: False lets programs use all of Python and whatever module is loaded, to try the walls alone.
    """

    def __init__(
        self,
        *,
        workers: int,
        wall_seconds: float = 3.0,
        cpu_seconds: float = 1.0,
        memory_mb: int = 256,
        allowed_imports: Sequence[str] = DEFAULT_IMPORTS,
        result_bytes: int = 65_536,
        cache_entries: int = 65_536,
        label: str = "",
        require: Require = "strict",
        is_gated: bool = True,
    ) -> None:
        settings = HelperSettings(
            allowed_imports=allowed_imports,
            memory_mb=memory_mb,
            result_bytes=result_bytes,
            is_gated=is_gated,
            label=label,
        )
        self._limits = Limits(
            wall_seconds=wall_seconds, cpu_seconds=max(1, math.ceil(cpu_seconds)), result_bytes=result_bytes
        )
        self._crew = Crew(settings, self._limits, workers=workers, require=require)
        self._verdicts: Recent[tuple[str, str, int, InputMode], Outcome] = Recent(cache_entries)
        self._codes: Recent[str, bytes] = Recent(min(cache_entries, 4096))
        self._literals: Recent[str, Outcome] = Recent(cache_entries)

    async def __aenter__(self) -> Self:
        await self._crew.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the sandbox. Runs in progress raise SandboxError."""
        self._crew.close()

    @property
    def layers(self) -> dict[str, str]:
        """What isolates the programs: layer -> `verified ...` or why it is not there."""
        return dict(self._crew.layers)

    @property
    def meter(self) -> Meter:
        """Outcomes by status, latency, forks, waiting programs."""
        return self._crew.meter

    @property
    def restarts(self) -> int:
        """Sandboxed processes that had to be replaced, so far."""
        return self._crew.restarts

    @property
    def busy_seconds(self) -> float:
        """Total so far: wall time in which a program was running, added up over programs running side by side."""
        return self._crew.meter.busy_seconds

    def numbers(self) -> dict[str, float]:
        """Everything countable so far, by flat names: for metrics."""
        meter = self._crew.meter
        return {
            **{f"executions.{status}": float(count) for status, count in meter.statuses.items()},
            **{f"latency_ms.p{percentile}": ms for percentile, ms in meter.latency_ms(50, 90, 99).items()},
            "remembered": float(meter.remembered),
            "forks": float(meter.forks),
            "kills": float(meter.kills),
            "restarts": float(self._crew.restarts),
            "waiting": float(meter.waiting),
            "busy_seconds": meter.busy_seconds,
        }

    async def run(
        self, program: str, inputs: Sequence[str], *, times: int = 1, input_mode: InputMode = "literal"
    ) -> list[Outcome]:
        """Run `f(<input>)` for each input; one outcome per input, in order.

        Every input is run with fresh module globals and under limits of its own, but inputs of one call may share a
        process. After an input that ran into a time limit the rest of the call is not tried: `timeout` as well.

        Args:
            program: Python source that defines `f`.
            inputs: argument lists as source text.
            times: 2 runs everything again in a differently seeded process, inputs in reverse order; outcomes that
                differ are `nondeterministic`.
            input_mode: `literal` refuses all but literals; `expression` evaluates the text in the program's process.

        Raises:
            SandboxError: the sandbox is closed, or its processes cannot be started.
        """
        known = {text: self._verdicts.get((program, text, times, input_mode)) for text in inputs}
        new = [text for text, outcome in known.items() if outcome is None]
        self.meter.remembered += len(inputs) - len(new)
        found = {text: outcome for text, outcome in known.items() if outcome is not None}
        for start in range(0, len(new), INPUTS_PER_FORK):
            part = new[start : start + INPUTS_PER_FORK]
            for text, outcome in zip(part, await self._judge(program, part, times, input_mode), strict=True):
                found[text] = outcome
                self.meter.count(outcome)
                if outcome is not NOT_TRIED:
                    self._verdicts.put((program, text, times, input_mode), outcome)
        return [found[text] for text in inputs]

    async def literal(self, text: str) -> Outcome:
        """The value of a Python literal: `ok`, or `rejected` when the text is anything else. Nothing is evaluated."""
        outcome = self._literals.get(text)
        if outcome is None:
            (part,) = await self._parse("value", None, [text])
            outcome = _literal_outcome(part)
            self._literals.put(text, outcome)
        return outcome

    async def _judge(self, program: str, inputs: list[str], times: int, input_mode: InputMode) -> list[Outcome]:
        code = self._codes.get(program)
        if code is None:
            code, *arguments = await self._parse(input_mode, program, inputs)
            self._codes.put(program, code)
        else:
            arguments = await self._parse(input_mode, None, inputs) if code[:1] == b"C" else []
        if code[:1] != b"C":
            return [_not_run(code)] * len(inputs)
        outcomes = [_not_run(argument) for argument in arguments]
        open_numbers = [number for number, argument in enumerate(arguments) if argument[:1] != b"E"]
        for repeat in range(times):
            results = await self._execute(repeat % 2, code[1:], [arguments[n] for n in open_numbers])
            for number, result in zip(open_numbers, results, strict=True):
                outcomes[number] = result if repeat == 0 else agreed(outcomes[number], result)
            # Nothing that ran into a limit is tried again. Reversed: what one input leaves to the next shows itself.
            open_numbers = [n for n in reversed(open_numbers) if outcomes[n].status in ("ok", "error")]
        return outcomes

    async def _execute(self, flavour: int, code: bytes, arguments: list[bytes]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        timeouts = 0
        while len(outcomes) < len(arguments):
            rest = arguments[len(outcomes) :]
            report = await self._crew.fork(flavour, code, rest)
            outcomes += outcomes_of(report, len(rest), self._limits)
            timeouts += report.was_killed
            if outcomes[-1].status == "timeout" or timeouts > 1:
                outcomes += [NOT_TRIED] * (len(arguments) - len(outcomes))
        return outcomes

    async def _parse(self, mode: str, program: str | None, inputs: list[str]) -> list[bytes]:
        texts = inputs if program is None else [program, *inputs]
        if any(len(text) > SOURCE_CHARACTERS for text in texts):
            return [f"Elonger than {SOURCE_CHARACTERS} characters".encode()] * len(texts)
        return await self._crew.parse(mode, program, inputs)


NOT_TRIED: Final = Outcome(status="timeout", error="not tried: an earlier input of the same call took too long")


def _not_run(part: bytes) -> Outcome:
    """The outcome of a program or input for which the parser gave this part."""
    status: Status = "error" if part[:1] == b"S" else "rejected"
    return Outcome(status=status, error=part[1:].decode("utf-8", "replace")[:200], ran=False)


def _literal_outcome(part: bytes) -> Outcome:
    if part[:1] != b"V":
        return _not_run(part)
    try:
        canonical, literal = read(part[1:].decode("utf-8", "replace"))
    except ValueError:
        return Outcome(status="rejected", error="not a literal", ran=False)
    return Outcome(status="ok", value=canonical, text=literal)
