"""What must hold of a run when all is over, whatever went wrong on the way. Each check gives one line per violation."""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from azr_async.faults.observer import JOURNAL, Books, Memory, final_books

METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints"
MANIFEST: Final = "manifest.json"
NEEDED: Final = frozenset({"resume.json", "optimizer.safetensors"})
"""What every checkpoint has, beside the model."""
TAIL_BYTES: Final = 32_768
"""Longer than a line."""


def violations(
    run_dir: Path, memory: Memory, *, steps: int, batch: int, max_lag: int, has_ended_well: bool
) -> list[str]:
    """Everything that is wrong with what a run has left behind.

    Args:
        memory: what was seen while it ran.
        steps: of the run.
        batch: samples of one step.
        max_lag: it was told, in steps.
        has_ended_well: it says itself that all of its steps are trained, so nothing may be half done.
    """
    found = [*memory.violations, *_metrics(run_dir, steps if has_ended_well else None, batch, max_lag)]
    found += damaged_checkpoints(run_dir)
    if has_ended_well and newest_checkpoint(run_dir) != steps:
        found.append(f"there is no checkpoint of step {steps}")
    if has_ended_well and not memory.looks:
        found.append("nobody has ever seen the journal while the run went on")
    if not (run_dir / JOURNAL).exists():
        return [*found, "there is no journal.sqlite"] if has_ended_well else found
    try:
        books = final_books(run_dir)
    except sqlite3.Error as error:
        return [*found, f"journal.sqlite cannot be read: {error}"]
    return [*found, *_journal(books, memory, steps=steps if has_ended_well else None, batch=batch)]


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; those that are no JSON are left out."""
    try:
        text = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def last_step(run_dir: Path) -> int:
    """The step of the last complete line of metrics.jsonl; 0 without one."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest checkpoint that has a manifest."""
    found = [int(path.parent.name.removeprefix("step-")) for path in _manifests(run_dir)]
    return max(found, default=None)


def _metrics(run_dir: Path, steps: int | None, batch: int, max_lag: int) -> Iterator[str]:
    lines = metric_lines(run_dir)
    told = [line["step"] for line in lines if line["step"] > 0]
    if steps is not None and told != list(range(1, steps + 1)):
        twice = sorted(step for step, count in Counter(told).items() if count > 1)
        missing = sorted(set(range(1, steps + 1)) - set(told))
        yield f"{METRICS} does not have steps 1 to {steps} once each, in order: twice {twice}, missing {missing}"
    for line in lines:
        if line["step"] == 0:  # the weights that the run began with
            continue
        lag, trained = line["lag"]["max"], line["samples"]["trained"]
        if lag > max_lag:
            yield f"step {line['step']}: a lag of {lag} is over the bound of {max_lag}"
        if trained != batch:
            yield f"step {line['step']}: {METRICS} tells of {trained} trained samples, not {batch}"


def damaged_checkpoints(run_dir: Path) -> Iterator[str]:
    """What is wrong with the checkpoints that have a manifest, which says that they are whole."""
    for manifest in _manifests(run_dir):
        try:
            files = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            yield f"{manifest} is damaged"
            continue
        if lacking := sorted(NEEDED - files.keys()):
            yield f"{manifest} knows of no {', '.join(lacking)}"
        for name, expected in files.items():
            if _fingerprint(manifest.with_name(name)) != expected:
                yield f"{manifest.with_name(name)} is not what its manifest says"


def _journal(books: Books, memory: Memory, *, steps: int | None, batch: int) -> Iterator[str]:
    if steps is not None:
        memory.is_over()
    before = len(memory.violations)
    memory.compare(books)
    yield from memory.violations[before:]
    # Samples of the last step count when its weights are saved, though the journal may not have heard of it.
    per_step = books.per_step + Counter(step for step in books.admitted.values() if step == steps)
    for step in range(1, max(per_step, default=0) + 1) if steps is None else range(1, steps + 1):
        count = per_step[step]
        is_of_the_past = steps is None and step == max(per_step)  # the run broke off in the middle of it
        if count > batch or (count < batch and not is_of_the_past):
            yield f"step {step} trained {count} samples, not {batch}"


def _manifests(run_dir: Path) -> list[Path]:
    return sorted((run_dir / CHECKPOINTS).glob(f"step-*/{MANIFEST}"))


def _fingerprint(path: Path) -> dict[str, str | int] | None:
    try:
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError:
        return None
