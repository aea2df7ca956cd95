"""The held-out suite, and where the shipped starter lives.

One problem a line: {"task", "program", "input", "output", "pairs", "message"}; `pairs` only for induction, and the
first half is shown. The programs are held out by their hash (`grammar.is_held_out`): no corpus holds them.
"""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

from azr_async.algorithm.values import encode
from azr_async.errors import CheckpointError
from azr_async.messages import TASKS, Pair, Problem
from azr_async.starter.corpus import random_problem

_HERE: Final = Path(__file__).parent
STARTER_CHECKPOINT: Final = _HERE / "checkpoint"
STARTER_SUITE: Final = _HERE / "heldout.jsonl"

PROBLEMS_PER_TASK: Final = 300
_SUITE_SEED: Final = 777


def load_suite(path: Path) -> list[Problem]:
    """The problems of a suite file, in its order.

    Raises CheckpointError when the file is missing or a line is not a problem.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}. Make it with `python -m azr_async starter`.") from error
    return [_problem(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def write_suite(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems so that `load_suite` reads them back."""
    path.write_text("".join(json.dumps(_row(problem)) + "\n" for problem in problems), encoding="utf-8")


def draw_suite(*, seed: int = _SUITE_SEED) -> list[Problem]:
    """Distinct held-out problems, `PROBLEMS_PER_TASK` of each kind, as often as the grammar draws them."""
    random, problems = Random(seed), dict[tuple[str, str, str], Problem]()
    for number, task in enumerate(TASKS, start=1):
        while len(problems) < PROBLEMS_PER_TASK * number:
            problem = random_problem(random, task, held_out=True)
            problems.setdefault(problem.key, problem)
    return list(problems.values())


def _row(problem: Problem) -> dict[str, Any]:
    first = problem.pairs[0]
    pairs = [[pair.input, pair.output] for pair in problem.pairs] if problem.task == "induction" else []
    return {
        "task": problem.task,
        "program": problem.program,
        "input": first.input,
        "output": first.output,
        "pairs": pairs,
        "message": problem.message,
    }


def _problem(path: Path, number: int, line: str) -> Problem:
    try:
        row = json.loads(line)
        pairs = row["pairs"] or [[row["input"], row["output"]]]
        if row["task"] not in TASKS:
            raise ValueError(f"unknown task {row['task']!r}")
        return Problem(
            task=row["task"],
            program=row["program"],
            pairs=tuple(_pair(argument, output) for argument, output in pairs),
            message=row["message"],
            shown_pairs=max(1, len(pairs) // 2),
        )
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise CheckpointError(
            f"{path}, line {number}: not a held-out problem ({error}). Make it with `python -m azr_async starter`."
        ) from error


def _pair(argument: str, output: str) -> Pair:
    return Pair(input=argument, output=output, value=encode(ast.literal_eval(output)))
