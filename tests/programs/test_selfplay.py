"""What self-play knows when it begins."""

from pathlib import Path

from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.library import IDENTITY_PROGRAM
from azr_async.algorithm.values import encode
from azr_async.config import Config
from azr_async.messages import Pair, Problem
from azr_async.programs.selfplay import restored_library


def adding(number: int) -> Problem:
    pair = Pair(input="1", output=str(1 + number), value=encode(1 + number))
    return Problem(task="deduction", program=f"def f(x):\n    return x + {number}", pairs=(pair,))


async def programs(journal: SqliteJournal, *, seeds: tuple[Problem, ...] = (), version: int) -> set[str]:
    library = await restored_library(Config(), journal, seeds, version=version)
    known = library.references("deduction", 100)
    return {problem.program for problem in known if problem.program != IDENTITY_PROGRAM}


async def test_a_resumed_run_does_not_know_what_was_found_after_its_checkpoint(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for version in range(4):
            await journal.add(adding(version), version=version)
        assert await programs(journal, version=2) == {adding(number).program for number in range(3)}
        assert journal.problems() == [adding(number) for number in range(4)]  # but none is lost


async def test_what_was_found_later_is_known_again_in_its_time(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for version in range(4):
            await journal.add(adding(version), version=version)
        library = await restored_library(Config(), journal, (), version=0)
        known = []
        for version in range(1, 5):
            library.settle(version)
            known.append(library.sizes()["deduction"] - 1)
    assert known == [1, 2, 3, 4]


async def test_seeds_are_written_down_once(tmp_path: Path) -> None:
    seeds = (adding(5), adding(6))
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        assert await programs(journal, seeds=seeds, version=0) == {seed.program for seed in seeds}
        await journal.add(adding(7), version=1)
        assert len(await programs(journal, seeds=seeds, version=1)) == 3
        assert journal.problems() == [*seeds, adding(7)]


async def test_a_resumed_library_draws_otherwise(tmp_path: Path) -> None:
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        for number in range(50):
            await journal.add(adding(number), version=0)
        drawn = [
            (await restored_library(Config(), journal, (), version=version)).references("deduction", 10)
            for version in (0, 0, 60)
        ]
    assert drawn[0] == drawn[1] != drawn[2]
