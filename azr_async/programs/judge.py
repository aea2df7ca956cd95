"""`python -m azr_async judge`: judges answers to tasks as self-play does, JSON lines in, JSON lines out.

In:  `{"id", "task", "program", "input", "output", "pairs", "answer"}`, as the task needs:
     deduction  `output`, or `program` and `input` to compute it; `answer` is a literal
     abduction  `program` and `output`, or `program` and `input` to compute it; `answer` is an argument list
     induction  `pairs`, each `[input, output]` or `{"input", "output"}`, all of which must match; `answer` is a program
Out: `{"id", "correct", "reason"}`, in the order of the input; `correct` is null where the host kept the sandbox from
     running the answer, several times.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.judging import (
    INDUCTION_RUNS,
    RIGHT,
    WRONG,
    Judgement,
    judge_abduction,
    judge_deduction,
    judge_induction,
    judged_pairs,
)
from azr_async.config import SandboxConfig
from azr_async.messages import TASKS, Outcome, Pair, Problem, Task
from azr_async.programs.execute import open_sandbox, sandbox_options
from azr_async.programs.jsonl import BadLine, Row, answer_lines, run_tool, text_field


class _GoldLost(Exception):
    """The host has kept the sandbox from finding the right answer."""


def main(arguments: Sequence[str]) -> int:
    """Judge every line; returns the exit status."""
    return run_tool(_parser(), arguments, _judge)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async judge",
        description="Judge answers to tasks. Each line of the file is an object with id, task (deduction, abduction or "
        "induction), program, input, output, pairs and answer, as the task needs; each answer an object with id, "
        "correct and reason, in the same order. Values are compared with their types: 1, True and 1.0 differ.",
    )
    sandbox_options(parser, SandboxConfig())
    parser.add_argument("--relative-tolerance", type=_tolerance, default=0.0, help="for floats, below 1 [0: exact]")
    return parser


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to less than 1")
    return number


async def _judge(options: argparse.Namespace) -> int:
    async with open_sandbox(options) as sandbox:

        async def answer(row: Row) -> Row:
            try:
                judgement = await _judgement(row, sandbox, options.relative_tolerance)
            except _GoldLost as error:
                judgement = Judgement(WRONG, f"not judged: {error}", is_judged=False)
            correct = judgement.reward == RIGHT if judgement.is_judged else None
            return {"id": row.get("id"), "correct": correct, "reason": judgement.reason}

        await answer_lines(options.file, options.output, answer=answer, refuse=_refuse)
    return 0


def _refuse(row: Row, reason: str) -> Row:
    return {"id": row.get("id"), "correct": False, "reason": f"bad line: {reason}"}


async def _judgement(row: Row, sandbox: SandboxPool, relative_tolerance: float) -> Judgement:
    task: Task | None = next((task for task in TASKS if task == row.get("task")), None)
    answer = text_field(row, "answer")
    if task is None:
        raise BadLine(f"field 'task' is not one of {', '.join(TASKS)}")
    problem = await _problem(task, row, sandbox)
    if task == "deduction":
        outcome = await sandbox.literal(answer)
        return judge_deduction(problem, outcome, relative_tolerance=relative_tolerance)
    if task == "abduction":
        (outcome,) = await sandbox.run(problem.program, [answer])
        return judge_abduction(problem, outcome, relative_tolerance=relative_tolerance)
    outcomes = await sandbox.run(answer, [pair.input for pair in judged_pairs(problem)], times=INDUCTION_RUNS)
    return judge_induction(problem, outcomes, relative_tolerance=relative_tolerance)


async def _problem(task: Task, row: Row, sandbox: SandboxPool) -> Problem:
    if task == "induction":
        pairs = row.get("pairs")
        if not isinstance(pairs, list) or not pairs:
            raise BadLine("field 'pairs' is not a list of at least one pair")
        gold = tuple([await _gold_pair(*_both(pair), sandbox) for pair in pairs])
        return Problem(task=task, program="", pairs=gold, shown_pairs=len(gold))
    program = text_field(row, "program") if task == "abduction" or "output" not in row else ""
    if "output" in row:
        pair = await _gold_pair("", text_field(row, "output"), sandbox)
    else:
        pair = await _computed_pair(program, text_field(row, "input"), sandbox)
    return Problem(task=task, program=program, pairs=(pair,))


def _both(pair: Any) -> tuple[str, str]:  # noqa: ANN401 - it comes from a line
    both = [pair.get("input"), pair.get("output")] if isinstance(pair, dict) else pair
    match both:
        case [str(text), str(output)]:
            return text, output
    raise BadLine("a pair is not [input, output], both texts")


async def _gold_pair(text: str, output: str, sandbox: SandboxPool) -> Pair:
    gold = _not_lost(await sandbox.literal(output))
    if gold.status != "ok":
        raise BadLine(f"the output {output[:60]!r} is no value: {gold.error}")
    return Pair(input=text, output=gold.text, value=gold.value)


async def _computed_pair(program: str, text: str, sandbox: SandboxPool) -> Pair:
    gold = _not_lost((await sandbox.run(program, [text], times=2))[0])
    if gold.status != "ok":
        raise BadLine(f"the program gives no value for its input: {gold.status}, {gold.error}")
    return Pair(input=text, output=gold.text, value=gold.value)


def _not_lost(outcome: Outcome) -> Outcome:
    if outcome.status == "lost":
        raise _GoldLost(outcome.error)
    return outcome
