"""The sandbox that self-play uses: many untrusted programs in flight, none of them trusted with anything."""

import math
from collections.abc import Sequence
from typing import Final, Literal, Self

from azr_async.adapters.sandbox.crew import Crew, Require
from azr_async.adapters.sandbox.helpers import HelperSettings
from azr_async.adapters.sandbox.inside.wire import DOUBTFUL
from azr_async.adapters.sandbox.meter import Meter
from azr_async.adapters.sandbox.recent import Recent, digest
from azr_async.adapters.sandbox.verdicts import KILLED, KILLED_LARGE, Limits, agreed, lost, outcomes_of
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
KILLED_RUNS: Final = 3
"""How often an input is tried whose process is killed from outside."""
DOUBTFUL_RUNS: Final = 5
"""Runs in which a program that may hang on hashes or clocks must agree, where an ordinary one must in two."""

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
        cache_mb: memory for verdicts, compiled programs and literals that were met before.
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
        cache_mb: int = 64,
        label: str = "",
        require: Require = "strict",
        is_gated: bool = True,
    ) -> None:
        limits = self._limits = Limits(
            wall_seconds=wall_seconds,
            cpu_seconds=max(1, math.ceil(cpu_seconds)),
            result_bytes=result_bytes,
            memory_mb=memory_mb,
        )
        settings = HelperSettings(
            allowed_imports=allowed_imports,
            memory_mb=memory_mb,
            cpu_seconds=limits.cpu_seconds,
            result_bytes=result_bytes,
            is_gated=is_gated,
            label=label,
        )
        self._crew = Crew(settings, self._limits, workers=workers, require=require)
        self._verdicts: Recent[Outcome] = Recent(cache_mb << 19)
        self._codes: Recent[bytes] = Recent(cache_mb << 18)
        self._literals: Recent[Outcome] = Recent(cache_mb << 18)

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
    def weakness(self) -> str:
        """What `require: best-effort` has let pass: how programs could get out; empty if they cannot."""
        return self._crew.weakness

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
            **{f"limits.{limit}": float(count) for limit, count in meter.limits.items()},
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
        process. After an input that ran into a time limit the rest of the call is not tried: `timeout` as well. Where
        no process could be had for an input, the rest of the call is `lost` with it.

        Args:
            program: Python source that defines `f`.
            inputs: argument lists as source text.
            times: 2 runs everything again in a differently seeded process, inputs in reverse order; outcomes that
                differ are `nondeterministic`.
            input_mode: `literal` refuses all but literals; `expression` evaluates the text in the program's process.

        Raises:
            SandboxError: the sandbox is closed, or its processes cannot be started.
        """
        program_key = digest(program)
        question = program_key + f"{times}{input_mode}".encode()
        keys = {text: question + digest(text) for text in inputs}
        known = {text: self._verdicts.get(key) for text, key in keys.items()}
        new = [text for text, outcome in known.items() if outcome is None]
        self.meter.remembered += len(inputs) - len(new)
        found = {text: outcome for text, outcome in known.items() if outcome is not None}
        for start in range(0, len(new), INPUTS_PER_FORK):
            part = new[start : start + INPUTS_PER_FORK]
            codes = await self._read(program, program_key, part, input_mode)
            for text, outcome in zip(part, await self._judge(*codes, times), strict=True):
                found[text] = outcome
                self.meter.count(outcome)
                if not _is_of_the_moment(outcome):
                    self._verdicts.put(keys[text], outcome, _size(outcome))
        return [found[text] for text in inputs]

    async def literal(self, text: str) -> Outcome:
        """The value of a Python literal: `ok`, or `rejected` when the text is anything else. Nothing is evaluated."""
        key = digest(text)
        outcome = self._literals.get(key)
        if outcome is None:
            (part,) = await self._parse("value", None, [text])
            outcome = _literal_outcome(part)
            if not _is_of_the_moment(outcome):
                self._literals.put(key, outcome, _size(outcome))
        return outcome

    async def _judge(self, code: bytes, arguments: list[bytes], times: int) -> list[Outcome]:
        """The outcomes of a program and its inputs, as the parts that the parser made of them."""
        if code[:1] != b"C":
            return [_not_run(code)] * len(arguments)
        outcomes = [_not_run(argument) for argument in arguments]
        open_numbers = [number for number, argument in enumerate(arguments) if argument[:1] in (b"A", b"X")]
        is_doubtful = DOUBTFUL in {code[1:2], *(arguments[number][1:2] for number in open_numbers)}
        for repeat in range(max(times, DOUBTFUL_RUNS) if times > 1 and is_doubtful else times):
            results = await self._execute(repeat, code[1:], [arguments[n] for n in open_numbers])
            for number, result in zip(open_numbers, results, strict=True):
                outcomes[number] = result if repeat == 0 else agreed(outcomes[number], result)
            # Nothing that ran into a limit is tried again. Reversed: what one input leaves to the next shows itself.
            open_numbers = [n for n in reversed(open_numbers) if outcomes[n].status in ("ok", "error")]
        return outcomes

    async def _read(
        self, program: str, key: bytes, inputs: list[str], input_mode: InputMode
    ) -> tuple[bytes, list[bytes]]:
        """The parts of the program and of its inputs."""
        code = self._codes.get(key)
        if code is not None:
            return code, await self._parse(input_mode, None, inputs) if code[:1] == b"C" else [code] * len(inputs)
        if len(program) > SOURCE_CHARACTERS:
            return _TOO_LONG, [_TOO_LONG] * len(inputs)
        code, *arguments = await self._parse(input_mode, program, inputs)
        if code[:1] not in (b"U", b"K"):
            self._codes.put(key, code, len(code))
        return code, arguments

    async def _execute(self, flavour: int, code: bytes, arguments: list[bytes]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        kills: list[Outcome] = []
        while len(outcomes) < len(arguments):
            rest = arguments[len(outcomes) :]
            report = await self._crew.fork(flavour, code, rest)
            if isinstance(report, str):  # the host has no process for this program: the next input would fare no better
                return outcomes + [lost(report)] * len(rest)
            found = outcomes_of(report, len(rest), self._limits)
            kills = [*kills, found[0]] if found[0] in (KILLED, KILLED_LARGE) else []
            if 0 < len(kills) < KILLED_RUNS:
                continue
            if kills:  # without the wall a program can kill itself: then it is charged with it
                found, kills = [KILLED if KILLED in kills and self._crew.is_walled else KILLED_LARGE], []
            outcomes += found
            if outcomes[-1].status == "timeout":
                outcomes += [NOT_TRIED] * (len(arguments) - len(outcomes))
        return outcomes

    async def _parse(self, mode: str, program: str | None, inputs: list[str]) -> list[bytes]:
        """The parts of all texts. An input that is too long is refused by itself."""
        fitting = [text for text in inputs if len(text) <= SOURCE_CHARACTERS]
        left = iter(await self._crew.parse(mode, program, fitting))
        head = [] if program is None else [next(left)]
        return head + [next(left) if len(text) <= SOURCE_CHARACTERS else _TOO_LONG for text in inputs]


_TOO_LONG: Final = f"Elonger than {SOURCE_CHARACTERS} characters".encode()

NOT_TRIED: Final = Outcome(status="timeout", error="not tried: an earlier input of the same call took too long")

UNREAD: Final = Outcome(status="rejected", error="it could not be parsed within limits", ran=False)


def _is_of_the_moment(outcome: Outcome) -> bool:
    """Whether the next try may end otherwise, so that this is not to be remembered."""
    return outcome is NOT_TRIED or outcome is UNREAD or outcome.status == "lost"


def _size(outcome: Outcome) -> int:
    return len(outcome.value) + len(outcome.text) + len(outcome.error)


def _not_run(part: bytes) -> Outcome:
    """The outcome of a program or input for which the parser gave this part."""
    if part[:1] == b"U":
        return UNREAD
    if part[:1] == b"K":
        return lost(part[1:].decode())
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
