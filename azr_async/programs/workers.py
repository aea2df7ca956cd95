"""`python -m azr_async workers RUN_DIR`: more or fewer inference workers for a run that is going on."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from azr_async.errors import AzrError
from azr_async.programs.arguments import whole_number
from azr_async.programs.mailbox import MOST_WORKERS, WorkersOrder, ask
from azr_async.programs.wiring import EXIT_DONE, EXIT_USAGE

ANSWER_SECONDS: Final = 30.0
"""Longest wait for the launcher, which looks for free GPUs before it answers."""


def main(arguments: Sequence[str]) -> int:
    """Ask the run's launcher; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m azr_async workers",
        description="Add inference workers to a run that is going on, or remove some.",
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run, as its first line tells it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--add", type=whole_number(1, MOST_WORKERS), metavar="N", help="start so many more")
    what.add_argument("--remove", nargs="+", metavar="NAME", help="end these, for instance inference-1")
    what.add_argument(
        "--set", type=whole_number(1, MOST_WORKERS), metavar="N", dest="total", help="have so many in all"
    )
    given = parser.parse_args(arguments)
    order = WorkersOrder(add=given.add or 0, remove=tuple(given.remove or ()), total=given.total)
    try:
        print(asyncio.run(ask(given.run_dir, order, deadline_seconds=ANSWER_SECONDS)))
    except AzrError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return EXIT_DONE
