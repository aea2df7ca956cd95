"""`python -m azr_async execute`: runs untrusted programs in the sandbox, JSON lines in, JSON lines out.

In:  `{"id", "program", "input"}`; `program` defines `f`, `input` is its argument list as source text.
Out: `{"id", "status", "value", "error", "wall_ms"}`, in the order of the input, and `"limit"` where it met one.
"""

import argparse
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from azr_async.adapters.sandbox.crew import Require
from azr_async.adapters.sandbox.pool import DEFAULT_IMPORTS, SandboxPool
from azr_async.config import SandboxConfig
from azr_async.errors import SandboxError
from azr_async.programs.arguments import whole_number
from azr_async.programs.jsonl import Row, answer_lines, run_tool, text_field

MOST_SECONDS: Final = 86_400

_BEYOND_SELF_PLAY: Final = "calendar codecs datetime hashlib io queue random time warnings weakref"
DEFAULTS: Final = SandboxConfig(
    wall_seconds=2.0,
    cpu_seconds=2,
    memory_mb=256,
    allowed_imports=(*DEFAULT_IMPORTS, *_BEYOND_SELF_PLAY.split()),
)
"""More modules than self-play allows: the runs that must agree tell what depends on chance or on the clock."""


def main(arguments: Sequence[str]) -> int:
    """Answer every line; returns the exit status."""
    return run_tool(_parser(), arguments, _execute)


def sandbox_options(parser: argparse.ArgumentParser, defaults: SandboxConfig) -> None:
    """The options of a tool that answers lines with a sandbox."""
    option = parser.add_argument
    option("file", nargs="?", default="-", metavar="FILE.jsonl", help="lines to answer; - streams [-]")
    option("--output", type=Path, help="file for the answers, written when all are there [standard output]")
    limit_options(parser, defaults)


def limit_options(parser: argparse.ArgumentParser, defaults: SandboxConfig) -> None:
    """The options that every tool with a sandbox has; of `defaults` it takes the limits and the allowed imports."""
    wall, cpu, memory = f"{defaults.wall_seconds:g}", defaults.cpu_seconds, defaults.memory_mb
    modules = ",".join(defaults.allowed_imports)
    option = parser.add_argument
    option("--wall-seconds", type=_seconds, default=defaults.wall_seconds, help=f"of one program on one input [{wall}]")
    option("--cpu-seconds", type=_seconds, default=float(cpu), help=f"the same in CPU time, rounded up [{cpu}]")
    option("--memory-mb", type=whole_number(1, 1 << 20), default=memory, help=f"of one program [{memory}]")
    cores = os.cpu_count() or 1
    option("--workers", type=whole_number(1, 1024), default=cores, help=f"programs side by side [cores: {cores}]")
    option("--allowed-imports", default=modules, metavar="A,B", help=f"modules for programs [{modules}]")
    option(
        "--require",
        choices=("strict", "best-effort"),
        default="strict",
        help="strict refuses to run where the isolation does not hold [strict]",
    )


@asynccontextmanager
async def open_sandbox(options: argparse.Namespace, *, require: Require | None = None) -> AsyncIterator[SandboxPool]:
    """The sandbox that `sandbox_options` describe; says on standard error if programs could get out of it."""
    async with SandboxPool(
        workers=options.workers,
        wall_seconds=options.wall_seconds,
        cpu_seconds=options.cpu_seconds,
        memory_mb=options.memory_mb,
        allowed_imports=[name for name in options.allowed_imports.split(",") if name],
        label="azr_async-tool",
        require=require or options.require,
    ) as sandbox:
        if sandbox.weakness:
            print(f"warning: {sandbox.weakness}", file=sys.stderr)
        yield sandbox


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async execute",
        description="Run untrusted programs in the sandbox. Each line of the file is an object with id, program and "
        "input; each answer an object with id, status, value, error and wall_ms, in the same order. status is one of "
        "ok, error, timeout, memory, blocked, nondeterministic, rejected, output_too_long, or lost where the host kept "
        "it from running; limit says which it met: wall, cpu, memory, processes, files, output or calls.",
    )
    sandbox_options(parser, DEFAULTS)
    runs = (
        "runs that must agree, in differently seeded processes; more than one are five for programs that use sets [2]"
    )
    parser.add_argument("--runs", type=whole_number(1, 100), default=2, help=runs)
    parser.add_argument(
        "--input-mode",
        choices=("literal", "expression"),
        default="literal",
        help="expression evaluates the input inside the sandbox; literal refuses all but literals [literal]",
    )
    parser.add_argument("--explain", action="store_true", help="print which isolation layers are active here, and end")
    return parser


async def _execute(options: argparse.Namespace) -> int:
    if options.explain:
        return await _explain(options)
    async with open_sandbox(options) as sandbox:

        async def answer(row: Row) -> Row:
            program, text = text_field(row, "program"), text_field(row, "input")
            (outcome,) = await sandbox.run(program, [text], times=options.runs, input_mode=options.input_mode)
            return {
                "id": row.get("id"),
                "status": outcome.status,
                "value": outcome.text if outcome.status == "ok" else None,
                "error": outcome.error or None,
                "wall_ms": round(outcome.wall_ms, 3),
            } | ({"limit": outcome.limit} if outcome.limit else {})

        await answer_lines(options.file, options.output, answer=answer, refuse=_refuse)
    return 0


def _refuse(row: Row, reason: str) -> Row:
    return {"id": row.get("id"), "status": "error", "value": None, "error": f"bad line: {reason}", "wall_ms": 0.0}


async def _explain(options: argparse.Namespace) -> int:
    """The layers that were found to work, each tried out, and whether they are enough."""
    async with open_sandbox(options, require="best-effort") as sandbox:
        layers = sandbox.layers
    width = max(map(len, layers))
    for layer, state in layers.items():
        print(f"{layer:<{width}}  {state}")
    try:
        async with open_sandbox(options, require="strict"):
            print("strict: starts here")
    except SandboxError as error:
        print(f"strict: refuses to start. {error}")
        return 1
    return 0


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, up to {MOST_SECONDS}")
    return number
