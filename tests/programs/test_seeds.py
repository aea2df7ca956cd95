"""Starting from a user's own tasks."""

import asyncio
from pathlib import Path

import pytest

from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.library import Library
from azr_async.config import ProposeConfig
from azr_async.errors import ConfigError
from azr_async.programs.seeds import add_seed_file, read_drafts


async def added(path: Path, text: str) -> Library:
    library = Library(capacity=100, seed=0)
    await asyncio.to_thread(path.write_text, text)
    async with SandboxPool(workers=1, label="test_seeds") as sandbox:
        await add_seed_file(path, library, sandbox=sandbox, config=ProposeConfig(), held_out_programs=())
    return library


async def test_tasks_of_a_file_are_run_and_kept(tmp_path: Path) -> None:
    lines = (
        '{"task": "deduction", "program": "def f(x):\\n    return x * 2", "input": "21"}\n\n'
        '{"task": "induction", "program": "def f(x): return -x", "inputs": ["1", "2", "3"], "message": "negate"}\n'
    )
    library = await added(tmp_path / "seeds.jsonl", lines)
    assert library.sizes() == {"deduction": 2, "abduction": 1, "induction": 1}
    assert [pair.output for pair in library.task("induction").pairs] == ["-1", "-2", "-3"]


async def test_a_task_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task 1 is not valid: error"):
        await added(tmp_path / "seeds.jsonl", '{"task": "deduction", "program": "def f(x): return y", "input": "1"}')


@pytest.mark.parametrize("line", ["{", '{"task": "deduction"}', '{"task": "poetry", "program": "", "input": ""}', "7"])
def test_a_line_that_is_no_task_is_named_with_an_example(tmp_path: Path, line: str) -> None:
    (tmp_path / "seeds.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"line 1: .* A line is"):
        read_drafts(tmp_path / "seeds.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_drafts(tmp_path / "nothing.jsonl")
