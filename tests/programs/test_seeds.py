"""Starting from a user's own tasks."""

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.library import Library
from azr_async.config import ProposeConfig
from azr_async.errors import ConfigError, SandboxError
from azr_async.messages import Outcome, Problem
from azr_async.programs.seeds import add_seeds, read_drafts, seed_problems


async def problems_of(path: Path, text: str, *, held_out_programs: Collection[str] = ()) -> list[Problem]:
    await asyncio.to_thread(path.write_text, text)
    async with SandboxPool(workers=1, label="test_seeds") as sandbox:
        return await seed_problems(path, sandbox=sandbox, config=ProposeConfig(), held_out_programs=held_out_programs)


async def test_tasks_of_a_file_are_run_and_kept_in_its_order(tmp_path: Path) -> None:
    lines = (
        '{"task": "deduction", "program": "def f(x):\\n    return x * 2", "input": "21"}\n\n'
        '{"task": "induction", "program": "def f(x): return -x", "inputs": ["1", "2", "3"], "message": "negate"}\n'
    )
    doubled, negated = await problems_of(tmp_path / "seeds.jsonl", lines)
    assert [pair.output for pair in doubled.pairs] == ["42"]
    assert [pair.output for pair in negated.pairs] == ["-1", "-2", "-3"]


async def test_seeds_enter_the_library_and_the_journal_unless_they_are_known(tmp_path: Path) -> None:
    line = '{"task": "deduction", "program": "def f(x):\\n    return x * 2", "input": "21"}\n'
    problems = await problems_of(tmp_path / "seeds.jsonl", line * 2)
    library = Library(capacity=100, seed=0)
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for _ in range(2):
            await add_seeds(problems, library, journal)
        assert journal.problems() == problems[:1]
        assert [found.version for found in journal.tasks()] == [0]
    assert library.sizes() == {"deduction": 2, "abduction": 1, "induction": 0}


async def test_held_out_programs_are_passed_over(tmp_path: Path) -> None:
    line = '{"task": "deduction", "program": "def f(x): return x", "input": "1"}'
    assert await problems_of(tmp_path / "seeds.jsonl", line, held_out_programs=("def f(x): return x",)) == []


async def test_a_task_that_does_not_run_is_named(tmp_path: Path) -> None:
    good = '{"task": "deduction", "program": "def f(x): return x", "input": "1"}'
    bad = good.replace("return x", "return y")
    with pytest.raises(ConfigError, match=r"line 3: not a valid task: error \(NameError: name 'y' is not defined\)"):
        await problems_of(tmp_path / "seeds.jsonl", f"{good}\n\n{bad}\n{bad}")


async def test_a_task_that_the_sandbox_has_lost_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: SandboxPool, program: str, inputs: Sequence[str], *, times: int = 1) -> list[Outcome]:
        return [Outcome(status="lost", error="killed") for _ in inputs]

    monkeypatch.setattr(SandboxPool, "run", run)
    line = '{"task": "deduction", "program": "def f(x): return x", "input": "1"}'
    with pytest.raises(SandboxError, match="line 1: could not be run: killed; free memory, then try again"):
        await problems_of(tmp_path / "seeds.jsonl", line)


@pytest.mark.parametrize("line", ["{", '{"task": "deduction"}', '{"task": "poetry", "program": "", "input": ""}', "7"])
def test_a_line_that_is_no_task_is_named_with_an_example(tmp_path: Path, line: str) -> None:
    (tmp_path / "seeds.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"line 1: .* A line is"):
        read_drafts(tmp_path / "seeds.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_drafts(tmp_path / "nothing.jsonl")
