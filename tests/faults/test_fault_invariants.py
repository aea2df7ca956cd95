"""Each violation that is planted into what a good run has left is found, and a good run has none."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from azr_async.adapters.journal.schema import migrate
from azr_async.faults.invariants import last_step, newest_checkpoint, violations
from azr_async.faults.observer import Memory, read_books

STEPS, BATCH = 4, 3


def write_journal(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as journal:
        migrate(journal, path)
        for statement in statements:
            journal.execute(statement)


def sample(group: int, number: int, step: int) -> str:
    return f"INSERT INTO samples VALUES ({group}, 'solve', {number}, {step - 1}, 'trained', 1.0, {step}, '')"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a good run of four steps has left."""
    lines = [{"step": 0}] + [
        {"step": step, "lag": {"max": 1}, "samples": {"trained": BATCH}} for step in range(1, STEPS + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "checkpoints" / f"step-{STEPS:06d}"
    folder.mkdir(parents=True)
    names = ("model.safetensors", "optimizer.safetensors", "resume.json")
    for name in names:
        (folder / name).write_bytes(b"content")
    digest = {"bytes": 7, "sha256": hashlib.sha256(b"content").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": dict.fromkeys(names, digest)}))
    write_journal(
        tmp_path / "journal.sqlite",
        *(
            "INSERT INTO tasks (id, task, program, pairs, shown, message, version) "
            f"VALUES ({number}, 'deduction', 'def f(): {number}', '[]', 1, '', 0)"
            for number in (1, 2, 3)
        ),
        *(sample(step, number, step) for step in range(1, STEPS + 1) for number in range(BATCH)),
    )
    return tmp_path


@pytest.fixture
def memory(run_dir: Path) -> Memory:
    """Of an observer that has seen all of it."""
    memory = Memory()
    memory.compare(read_books(run_dir / "journal.sqlite"))
    return memory


def checked(run_dir: Path, memory: Memory, *, has_ended_well: bool = True) -> list[str]:
    return violations(run_dir, memory, steps=STEPS, batch=BATCH, max_lag=1, has_ended_well=has_ended_well)


def test_a_good_run_violates_nothing(run_dir: Path, memory: Memory) -> None:
    assert checked(run_dir, memory) == []
    assert last_step(run_dir) == newest_checkpoint(run_dir) == STEPS


def sql(statement: str) -> Callable[[Path], None]:
    return lambda run_dir: write_journal(run_dir / "journal.sqlite", statement)


def change_metrics(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path], None]:
    def plant(run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        change(lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return plant


def damage_checkpoint(run_dir: Path) -> None:
    (run_dir / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors").write_bytes(b"CONTENT")


def lose_last_checkpoint(run_dir: Path) -> None:
    last = run_dir / "checkpoints" / f"step-{STEPS:06d}"
    last.rename(last.with_name("step-000002"))


def forget_files(run_dir: Path) -> None:
    manifest = run_dir / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "files": {}}))


def damage_journal(run_dir: Path) -> None:
    (run_dir / "journal.sqlite").write_bytes(b"no database at all, whatever it is called" * 100)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (sql("DELETE FROM tasks WHERE id = 2"), "1 acknowledged tasks are gone or changed, the first is row 2"),
        (sql("UPDATE tasks SET program = 'def f(): 9' WHERE id = 3"), "the first is row 3"),
        (sql("UPDATE samples SET step = 3 WHERE group_id = 2 AND number = 0"), "samples were trained twice"),
        (sql(sample(9, 0, 2)), "step 2 trained 4 samples, not 3"),
        (sql("DELETE FROM samples WHERE group_id = 2 AND number = 0"), "step 2 trained 2 samples, not 3"),
        (sql("INSERT INTO steps VALUES (2, 'trained', '', 1)"), "step 2 trained 4 samples, not 3"),
        (damage_journal, "journal.sqlite cannot be read"),
        (change_metrics(lambda lines: lines.pop(2)), "missing [2]"),
        (change_metrics(lambda lines: lines.insert(2, lines[2])), "twice [2]"),
        (change_metrics(lambda lines: lines[3]["lag"].update(max=2)), "step 3: a lag of 2 is over the bound of 1"),
        (change_metrics(lambda lines: lines[1]["samples"].update(trained=2)), "step 1: metrics.jsonl tells of 2"),
        (damage_checkpoint, "model.safetensors is not what its manifest says"),
        (forget_files, "knows of no optimizer.safetensors, resume.json"),
        (lose_last_checkpoint, "there is no checkpoint of step 4"),
    ],
)
def test_a_planted_violation_is_found(run_dir: Path, memory: Memory, plant: Callable[[Path], None], found: str) -> None:
    plant(run_dir)
    assert found in "\n".join(checked(run_dir, memory))


def test_a_run_that_nobody_has_looked_at_shows_nothing(run_dir: Path) -> None:
    assert checked(run_dir, Memory()) == ["nobody has ever seen the journal while the run went on"]


def test_samples_whose_rows_were_summed_up_still_count(run_dir: Path, memory: Memory) -> None:
    write_journal(
        run_dir / "journal.sqlite",
        "DELETE FROM samples WHERE step = 1",
        f"INSERT INTO steps VALUES (1, 'trained', '', {BATCH})",
    )
    assert checked(run_dir, memory) == []


def test_what_was_trained_after_a_checkpoint_may_be_trained_again_by_who_goes_on_from_it(
    run_dir: Path, memory: Memory
) -> None:
    memory.went_back_to(2)
    write_journal(
        run_dir / "journal.sqlite",
        "UPDATE samples SET step = 7 - step WHERE step > 2",  # the groups of steps 3 and 4 change places
    )
    assert checked(run_dir, memory) == []


def test_rows_that_are_still_to_be_rolled_back_are_not_taken_for_trained(run_dir: Path, memory: Memory) -> None:
    memory.went_back_to(2)
    memory.compare(read_books(run_dir / "journal.sqlite"))
    assert set(memory.trained.values()) == {1, 2}
    memory.hear(4)  # metrics have not been cut off yet
    memory.compare(read_books(run_dir / "journal.sqlite"))
    assert set(memory.trained.values()) == {1, 2}
    memory.hear(2)
    memory.hear(3)
    memory.compare(read_books(run_dir / "journal.sqlite"))
    assert set(memory.trained.values()) == {1, 2, 3, 4}


def test_a_run_that_goes_on_from_its_beginning_still_owes_its_tasks(run_dir: Path, memory: Memory) -> None:
    memory.went_back_to(0)
    write_journal(run_dir / "journal.sqlite", "UPDATE samples SET step = 5 - step")
    assert checked(run_dir, memory) == []
    write_journal(run_dir / "journal.sqlite", "DELETE FROM tasks")
    assert "3 acknowledged tasks are gone" in "\n".join(checked(run_dir, memory))


def test_an_unfinished_run_may_lack_its_last_steps(run_dir: Path, memory: Memory) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:2]) + '{"st')
    assert last_step(run_dir) == 1
    assert checked(run_dir, memory, has_ended_well=False) == []
