"""`python -m azr_async evaluate`: greedy accuracy of a model on held-out tasks, judged as self-play judges.

A suite is the starter's own, a file of its form, or one of the form of CRUXEval (Gu et al. 2024, arXiv:2401.03065): a
line `{"id", "code", "input", "output"}`, asked for the output (`--mode output`: deduction) or for an input that gives
it (`--mode input`: abduction; any such input is right).
"""

import argparse
import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.judging import RIGHT
from azr_async.config import SandboxConfig
from azr_async.errors import CheckpointError, SandboxError
from azr_async.messages import Attempt, Challenge, Completion, GenerateJob, Judged, Pair, Problem, Task
from azr_async.ports import Dialogue, Sandbox
from azr_async.programs.arguments import whole_number
from azr_async.programs.execute import limit_options, open_sandbox
from azr_async.programs.jsonl import InputError, run_tool
from azr_async.programs.parts import channel
from azr_async.stages.verify import verify
from azr_async.starter.suite import STARTER_SUITE, load_suite

NORMAL_95: Final = 1.959964
"""The 97.5 % point of the normal distribution."""


def main(arguments: Sequence[str]) -> int:
    """Ask, judge and tell; returns the exit status."""
    return run_tool(_parser(), arguments, _evaluate)


async def judge_all(
    problems: Sequence[Problem], completions: Sequence[Completion], *, sandbox: Sandbox, dialogue: Dialogue
) -> list[float]:
    """The rewards of completions, one for each problem, in order; NaN where the sandbox has lost the answer."""
    attempts, attempted = channel(Attempt)
    judgements, judged = channel(Judged)
    rewards = [math.nan] * len(problems)

    async def ask() -> None:
        async with attempts:
            for number, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
                challenge = Challenge(group_id=number, problem=problem, proposal=None, attempts=1, trained_attempts=0)
                await attempts.send(Attempt(challenge=challenge, completion=completion))

    async with asyncio.TaskGroup() as group:
        group.create_task(ask(), name="ask")
        judging = verify(attempted, judgements, sandbox=sandbox, dialogue=dialogue, float_tolerance=0.0)
        group.create_task(judging, name="verify")
        async for item in judged:
            if item.is_judged:
                rewards[item.attempt.challenge.group_id] = item.reward
    return rewards


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, JASA 22, 209); all of [0, 1] when nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    share, squared = right / asked, NORMAL_95**2
    middle = share + squared / (2 * asked)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / asked + squared / (4 * asked**2))
    return max(0.0, (middle - half) / (1 + squared / asked)), min(1.0, (middle + half) / (1 + squared / asked))


async def cruxeval_problems(path: Path, task: Task, *, sandbox: Sandbox) -> list[Problem]:
    """The problems of a CRUXEval file as `task`.

    Raises InputError when it cannot be read, or naming the line that is not of its form; SandboxError when the sandbox
    has lost a line.
    """

    async def problem(number: int, line: str) -> Problem:
        try:
            row = json.loads(line)
            program, argument, output = str(row["code"]), str(row["input"]), str(row["output"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: {error!s} is missing or wrong. A line is "
                '{"id": "sample_0", "code": "def f(x): ...", "input": "1, 2", "output": "3"}.'
            ) from error
        gold = await sandbox.literal(output)
        if gold.status == "lost":
            raise SandboxError(f"{path}, line {number}: could not be run: {gold.error}; free memory, then try again.")
        if gold.status != "ok":
            raise InputError(f"{path}, line {number}: the output {output[:60]!r} is no Python literal. Correct it.")
        return Problem(task=task, program=program, pairs=(Pair(input=argument, output=gold.text, value=gold.value),))

    return [await problem(number, line) for number, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Name a JSONL file of tasks, or `starter`.") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def greedy_answers(
    model_path: str, problems: Sequence[Problem], options: argparse.Namespace, *, on_progress: Callable[[int], object]
) -> list[Completion]:
    """One greedy completion for each problem, in order. Raises CheckpointError, EngineError."""
    import torch  # loads for seconds; --help needs none of it

    from azr_async.adapters.engines.embedded import EmbeddedEngine
    from azr_async.adapters.models import load_model

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load_model(model_path, options.precision, device)
    engine = EmbeddedEngine(model, tokenizer, slots=options.slots, context_tokens=options.context_tokens)
    dialogue = make_dialogue(options.dialogue)
    for number, problem in enumerate(problems):
        engine.submit(
            GenerateJob(
                job_id=number,
                prompt=dialogue.solve(problem),
                samples=1,
                priority=0,
                temperature=0.0,
                top_p=1.0,
                max_tokens=options.max_tokens,
                seed=0,
            )
        )
    answers: dict[int, Completion] = {}
    while engine.has_work:
        answers |= {completion.job_id: completion for completion in engine.step()}
        on_progress(len(answers))
    return [answers[number] for number in range(len(problems))]


async def _evaluate(options: argparse.Namespace) -> int:
    console = Console(stderr=True)
    dialogue = make_dialogue(options.dialogue)
    async with open_sandbox(options) as sandbox:
        problems = await _problems(options, sandbox)
        if not problems:
            raise InputError(f"there are no tasks in {options.suite}. Name a file that has some.")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("answering", total=len(problems))
            completions = await asyncio.to_thread(
                greedy_answers,
                options.model,
                problems,
                options,
                on_progress=lambda done: progress.update(bar, completed=done),
            )
        rewards = await judge_all(problems, completions, sandbox=sandbox, dialogue=dialogue)
    too_long = sum(completion.finish == "prompt_too_long" for completion in completions)
    if too_long:
        console.print(f"warning: {too_long} prompts do not fit --context-tokens {options.context_tokens}: not solved")
    results = _results(problems, rewards)
    if lost := results["all"]["lost"]:
        console.print(f"warning: {lost} answers were lost by the sandbox: not solved. Free memory, then try again")
    if options.json:
        print(json.dumps(results))
    else:
        _show(results)
    return 0


async def _problems(options: argparse.Namespace, sandbox: Sandbox) -> list[Problem]:
    if options.suite == "starter":
        return load_suite(STARTER_SUITE)
    path = Path(options.suite)
    if options.mode is None:
        try:
            return load_suite(path)
        except CheckpointError as error:
            raise InputError(f"{error} For a file of CRUXEval's form, say --mode output or --mode input.") from error
    return await cruxeval_problems(path, "deduction" if options.mode == "output" else "abduction", sandbox=sandbox)


def _results(problems: Sequence[Problem], rewards: Sequence[float]) -> dict[str, dict[str, Any]]:
    earned = np.array(rewards)
    kinds = np.array([problem.task for problem in problems])
    rows = {task: earned[kinds == task] for task in dict.fromkeys(kinds.tolist())} | {"all": earned}
    return {
        task: {
            "accuracy": float((row == RIGHT).mean()),
            "n": len(row),
            "interval_95": wilson_interval(int((row == RIGHT).sum()), len(row)),
            "lost": int(np.isnan(row).sum()),
        }
        for task, row in rows.items()
    }


def _show(results: dict[str, dict[str, Any]]) -> None:
    table = Table("task", "n", "accuracy", "95 % interval")
    for task, row in results.items():
        low, high = row["interval_95"]
        table.add_row(task, str(row["n"]), f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}")
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async evaluate",
        description="Greedy accuracy of a model on held-out tasks, with n and a 95 % interval; judged in the sandbox, "
        "as self-play judges. Suites: `starter` (900 tasks of three kinds), or a JSONL file: of the starter suite's "
        "form, or with --mode of CRUXEval's.",
    )
    option = parser.add_argument
    option("--model", required=True, help="`starter`, a folder such as runs/X/checkpoints/step-000120, or a hub id")
    option("--suite", default="starter", help="`starter` or a JSONL file [starter]")
    option("--mode", choices=("output", "input"), help="for a file of CRUXEval's form: what is asked for")
    option(
        "--dialogue", choices=("compact", "azr-chat", "azr-base"), default="compact", help="prompt language [compact]"
    )
    option("--max-tokens", type=whole_number(1, 1 << 20), default=48, help="longest answer [48]")
    option(
        "--context-tokens", type=whole_number(2, 1 << 22), default=256, help="longest prompt and answer together [256]"
    )
    option("--slots", type=whole_number(1, 1 << 16), default=128, help="answers generated side by side [128]")
    option("--precision", choices=("float32", "bfloat16"), default="float32", help="type of the weights [float32]")
    option("--device", help="such as cpu or cuda:1 [cuda if there is one, else cpu]")
    option("--json", action="store_true", help="print the results as one JSON object")
    limit_options(parser, SandboxConfig())
    return parser
