"""Tasks that a user gives to start from, instead of the identity triplet alone."""

import json
from collections.abc import Collection
from pathlib import Path

from azr_async.algorithm.library import Library
from azr_async.algorithm.validity import problem_from
from azr_async.config import ProposeConfig
from azr_async.errors import ConfigError
from azr_async.messages import TASKS, Draft
from azr_async.ports import Sandbox


async def add_seed_file(
    path: Path, library: Library, *, sandbox: Sandbox, config: ProposeConfig, held_out_programs: Collection[str]
) -> int:
    """Run every task of a JSONL file in the sandbox and keep the valid ones; returns how many entered the library.

    A line: {"task", "program", "input": text} or, for induction, {"task", "program", "inputs": [text], "message"}.

    Raises ConfigError naming the line that is not a task, or the first that does not run.
    """
    added = 0
    for number, draft in enumerate(read_drafts(path), start=1):
        outcomes = await sandbox.run(draft.program, draft.inputs, times=config.determinism_runs)
        verdict = problem_from(draft, outcomes, text_limit=config.text_limit, held_out_programs=held_out_programs)
        if isinstance(verdict, str):
            if verdict == "held_out":
                continue
            raise ConfigError(
                f"{path}: task {number} is not valid: {verdict}. Correct it or take it out; "
                "library.seed_file wants programs that run."
            )
        added += library.add(verdict)
    return added


def read_drafts(path: Path) -> list[Draft]:
    """The tasks of a seed file, not yet run."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"library.seed_file {path}: {error.strerror}. Name a readable JSONL file.") from error
    return [_draft(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


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
