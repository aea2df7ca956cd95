"""`python -m azr_async execute`: runs untrusted programs in the sandbox, JSON lines in, JSON lines out.

In:  `{"id", "program", "input"}`; `program` defines `f`, `input` is its argument list as source text.
Out: `{"id", "status", "value", "error", "wall_ms"}`, in the order of the input.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import uvloop

from azr_async.adapters.sandbox.crew import Require
from azr_async.adapters.sandbox.pool import DEFAULT_IMPORTS, SandboxPool
from azr_async.errors import AzrError, SandboxError
from azr_async.programs.jsonl import InputError, Row, answer_lines, text_field

WIDE_IMPORTS: Final = (
    *DEFAULT_IMPORTS,
    *("calendar", "codecs", "datetime", "hashlib", "io", "queue", "random", "time", "warnings", "weakref"),
)
"""More than self-play allows: here the runs that must agree tell what depends on chance or on the clock."""


def main(arguments: Sequence[str]) -> int:
    """Answer every line; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as leaving:  # argparse has told the user what is wrong, or what --help asks for
        return int(leaving.code or 0)
    try:
        uvloop.run(_explain(options) if options.explain else _execute(options))
    except InputError as error:
        print(f"execute: {error}", file=sys.stderr)
        return 2
    except AzrError as error:
        print(f"execute: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def sandbox_options(parser: argparse.ArgumentParser) -> None:
    """The options that every tool with a sandbox has."""
    parser.add_argument("file", nargs="?", default="-", metavar="FILE.jsonl", help="lines to answer; - streams [-]")
    parser.add_argument("--output", type=Path, help="file for the answers [standard output]")
    parser.add_argument("--wall-seconds", type=_positive, default=2.0, help="wall time of one program [2]")
    parser.add_argument("--memory-mb", type=_count, default=256, help="memory of one program [256]")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="programs side by side [cores]")
    parser.add_argument("--allowed-imports", default=",".join(WIDE_IMPORTS), help="modules, with commas between")
    parser.add_argument(
        "--require",
        choices=("strict", "best-effort"),
        default="strict",
        help="strict refuses to run where the isolation does not hold [strict]",
    )


def open_sandbox(options: argparse.Namespace, *, require: Require | None = None) -> SandboxPool:
    """The sandbox that `sandbox_options` describe."""
    return SandboxPool(
        workers=options.workers,
        wall_seconds=options.wall_seconds,
        # The wall clock is the limit that was asked for; CPU time alone never ends a program before it.
        cpu_seconds=math.ceil(options.wall_seconds),
        memory_mb=options.memory_mb,
        allowed_imports=[name for name in options.allowed_imports.split(",") if name],
        label="azr_async-tool",
        require=require or options.require,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async execute",
        description="Run untrusted programs in the sandbox. Each line of the file is an object with id, program and "
        "input; each answer an object with id, status, value, error and wall_ms, in the same order. status is one of "
        "ok, error, timeout, memory, blocked, nondeterministic, rejected, output_too_long.",
    )
    sandbox_options(parser)
    parser.add_argument(
        "--runs", type=_count, default=2, help="runs that must agree, in differently seeded processes [2]"
    )
    parser.add_argument(
        "--input-mode",
        choices=("literal", "expression"),
        default="literal",
        help="expression evaluates the input inside the sandbox; literal refuses all but literals [literal]",
    )
    parser.add_argument("--explain", action="store_true", help="print which isolation layers are active here, and end")
    return parser


async def _execute(options: argparse.Namespace) -> None:
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
            }

        await answer_lines(options.file, options.output, answer=answer, refuse=_refuse)


def _refuse(row: Row, reason: str) -> Row:
    return {"id": row.get("id"), "status": "error", "value": None, "error": f"bad line: {reason}", "wall_ms": 0.0}


async def _explain(options: argparse.Namespace) -> None:
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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0.0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return number
