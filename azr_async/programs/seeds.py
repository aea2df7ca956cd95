"""Tasks that a user gives to start from, instead of the identity triplet alone."""

import asyncio
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from azr_async.algorithm.library import Library
from azr_async.algorithm.validity import problem_from
from azr_async.config import ProposeConfig
from azr_async.errors import ConfigError, SandboxError
from azr_async.messages import TASKS, Draft, Problem
from azr_async.ports import Journal, Sandbox


async def seed_problems(
    path: Path, *, sandbox: Sandbox, config: ProposeConfig, held_out_programs: Collection[str]
) -> list[Problem]:
    """Run every task of a JSONL file in the sandbox, side by side; returns the valid ones in the file's order.

    A line: {"task", "program", "input": text} or, for induction, {"task", "program", "inputs": [text], "message"}.
    A task with a held-out program is passed over.

    Raises ConfigError naming the line that is not a task, or the first that does not run; SandboxError naming the first
    that the sandbox has lost.
    """
    drafts = read_drafts(path)
    async with asyncio.TaskGroup() as group:
        runs = [
            group.create_task(sandbox.run(draft.program, draft.inputs, times=config.determinism_runs))
            for draft in drafts.values()
        ]
    problems = []
    for (number, draft), run in zip(drafts.items(), runs, strict=True):
        outcomes = run.result()
        verdict = problem_from(draft, outcomes, text_limit=config.text_limit, held_out_programs=held_out_programs)
        if isinstance(verdict, Problem):
            problems.append(verdict)
        elif verdict == "lost":
            why = next(outcome.error for outcome in outcomes if outcome.status == "lost")
            raise SandboxError(f"{path}, line {number}: could not be run: {why}; free memory, then try again.")
        elif verdict != "held_out":
            why = next((f" ({outcome.error})" for outcome in outcomes if outcome.error), "")
            raise ConfigError(
                f"{path}, line {number}: not a valid task: {verdict}{why}. Correct it or take it out; "
                "library.seed_file wants programs that run."
            )
    return problems


async def add_seeds(problems: Iterable[Problem], library: Library, journal: Journal) -> None:
    """Put into the library, and write down, those that a resumed run does not know from its journal already."""
    for problem in problems:
        if library.add(problem):
            await journal.add(problem, version=0)


def read_drafts(path: Path) -> dict[int, Draft]:
    """The tasks of a seed file, not yet run, by the number of their line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"library.seed_file {path}: {error.strerror}. Name a readable JSONL file.") from error
    return {number: _draft(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()}


def _draft(path: Path, number: int, line: str) -> Draft:
    try:
        row = json.loads(line)
        inputs = row["inputs"] if row["task"] == "induction" else [row["input"]]
        texts = [row["program"], *inputs, row.get("message", "")]
        if row["task"] not in TASKS or not all(isinstance(text, str) for text in texts):
            raise ValueError("a field has the wrong type, or the task is unknown")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}, line {number}: {error!s} is missing or wrong. A line is "
            '{"task": "deduction", "program": "def f(x): ...", "input": "1, 2"}; '
            'induction has "inputs": [...] and "message" instead.'
        ) from error
    return Draft(task=row["task"], program=row["program"], inputs=tuple(inputs), message=row.get("message", ""))
