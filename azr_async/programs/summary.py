"""Reads metrics.jsonl while it grows, and tells in plain words how a run ended."""

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from azr_async.messages import TASKS
from azr_async.programs.fates import Ended, Loss, RunEnd
from azr_async.programs.folders import JOURNAL_FILE, begun_from
from azr_async.programs.view import duration
from azr_async.programs.wiring import LastWords

Metrics = Mapping[str, Any]
LOG_LINES: Final = 12
LOG_TAIL_BYTES: Final = 16_384
GAVE_UP: Final = 128 + signal.SIGTERM
"""Exit status of a program that was told twice to stop."""

_LEARNER: Final = "learner-"


class MetricsReader:
    """Follows a metrics.jsonl that another process appends to; hands out complete lines only, each once."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self._path, self._first_step = path, first_step
        self._read_bytes = 0

    def new_lines(self) -> list[Metrics]:
        """Lines that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        lines = map(json.loads, complete.splitlines())
        return [line for line in lines if line["step"] >= self._first_step]


def what_was_learned(lines: Sequence[Metrics], run_dir: Path, restarts: Mapping[str, int] | None = None) -> str:
    """The summary of a run that is done. `restarts`: how often programs were lost on the way."""
    steps = [line for line in lines if line["step"] > 0]
    if not steps:
        return f"Done, without a training step.\n{_row('files', str(run_dir))}"
    headline = f"Done: {steps[-1]['step']} steps in {duration(lines[-1]['wall_seconds'])} of training."
    rows = [*_learned(lines), *_stale(steps), *_busy(lines), *_tokens(steps), *_weights(steps)]
    rows += [*_sandbox(lines), *_lost(restarts or {}), *_files(run_dir)]
    return "\n".join([headline, *rows])


def how_it_was_interrupted(lines: Sequence[Metrics], steps: int, run_dir: Path, *, is_saved: bool = True) -> str:
    """What there is after Ctrl-C, and how to go on. Not `is_saved`: the learner ended without its checkpoint."""
    step = lines[-1]["step"] if lines else 0
    after = f"Stopped after step {step} of {steps}. Everything is in {run_dir}."
    way_on = how_to_go_on(run_dir)
    if not way_on:
        why = "There was nothing to save yet" if is_saved else "No checkpoint was written"
        return f"{after} {why}; the same command starts again."
    return f"{after}\n{way_on}"


def how_to_go_on(run_dir: Path) -> str:
    """The command that continues from the newest checkpoint, or from the beginning; empty where nothing can be."""
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    if not checkpoints and not begun_from(run_dir) and not begins_anew(run_dir):
        return ""
    return f"Go on with: python run.py --resume {checkpoints[-1] if checkpoints else run_dir}"


def begins_anew(run_dir: Path) -> bool:
    """Is this a run without a checkpoint that can be resumed all the same, from its beginning, with its tasks?

    A run's first checkpoint is there before its second step: one that has taken more steps has lost its checkpoints, or
    wanted none (`checkpoint.every_steps = 0`), and its lines are not to be cut. One that began with the checkpoint of
    another folder has its beginning there.
    """
    if not (run_dir / JOURNAL_FILE).is_file() or begun_from(run_dir):
        return False
    try:
        lines = MetricsReader(run_dir / "metrics.jsonl").new_lines()
    except (ValueError, KeyError):  # damaged: nobody knows how far it came
        return False
    return not lines or lines[-1]["step"] <= 1


def what_failed_while_stopping(end: RunEnd, words: Mapping[str, LastWords], run_dir: Path) -> list[str]:
    """After Ctrl-C: a line or more for each program that did not end as it should, the causes before the rest."""
    messages = []
    for name in _unsaved_learners(end):
        log = run_dir / "logs" / f"{name}.log"
        messages.append(f"{name} did not finish and was killed: the last step was not saved. Its log: {log}")
    others = [one for one in end.programs if one.status not in (0, GAVE_UP) and not _ended_by_sigterm(one)]
    causes = [one for one in others if one.name not in words or not words[one.name].is_consequence]
    for one in causes or ([] if messages else others):
        last = words.get(one.name)
        messages.append(how_it_failed(end, one, last.message if last else "", run_dir))
    idle = [name for name in end.killed if not name.startswith(_LEARNER)]
    if idle and not messages:
        messages.append(f"{', '.join(idle)} did not end in time and had to be killed; nothing was lost by it.")
    return messages


def how_it_failed(end: RunEnd, culprit: Ended | None, words: str, run_dir: Path) -> str:
    """The one message of a run that failed: what, which process, its last words, where the log is."""
    if culprit is None:
        return f"The run failed: {end.complaint} The logs are in {run_dir / 'logs'}."
    log = run_dir / "logs" / f"{culprit.name}.log"
    count = end.restarts.get(culprit.name, 0)
    before = f"\nIt had been started again {count} time{'s' if count > 1 else ''} before." if count else ""
    if words:
        return f"{culprit.name} failed: {words}{before}\nIts log: {log}"
    tail = "".join(f"\n    {line}" for line in last_lines(log)) or "\n    (nothing)"
    return f"{culprit.name} {how_it_ended(culprit)}{before}\nLast lines of its log, {log}:{tail}"


def how_it_ended(ended: Ended) -> str:
    """An exit status in words."""
    status = ended.status
    if ended.was_silent:
        return "had not answered for wires.peer_timeout_seconds, so it was killed."
    if status >= 0:
        return f"ended with exit status {status}."
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " Perhaps the machine ran out of memory: `dmesg` tells." if -status == signal.SIGKILL else ""
    return f"was killed by {name}.{hint}"


def how_it_was_lost(loss: Loss, words: LastWords | None, max_restarts: int) -> str:
    """What the user is told when a program is lost and started again."""
    ended = loss.ended
    how = f"failed: {words.message}" if words else how_it_ended(ended)
    return f"{ended.name} {how} It starts again in {loss.after_seconds:g} s ({loss.number} of {max_restarts} times)."


def how_it_left(ended: Ended) -> str:
    """What the user is told when a worker that was to be removed is gone."""
    return f"{ended.name} has left." if ended.status == 0 else f"{ended.name} has left: it {how_it_ended(ended)}"


def last_lines(path: Path, count: int = LOG_LINES) -> list[str]:
    """The end of a log; nothing when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def _unsaved_learners(end: RunEnd) -> list[str]:
    """Ranks that were stopped in the middle of a step or of a checkpoint."""
    gave_up = [one.name for one in end.programs if one.status == GAVE_UP]
    return [name for name in (*end.killed, *gave_up) if name.startswith(_LEARNER)]


def _ended_by_sigterm(one: Ended) -> bool:
    return one.was_told and one.status == -signal.SIGTERM  # before it had begun to listen for it


def _learned(lines: Sequence[Metrics]) -> Iterator[str]:
    evaluations = [line["eval"] for line in lines if line.get("eval")]
    if len(evaluations) < 2:
        yield _row("learned", "not measured: there was no evaluation at both ends (evaluation.suite)")
        return
    first, last = evaluations[0], evaluations[-1]
    gain = 100 * (last["mean"] - first["mean"])
    yield _row(
        "learned",
        f"accuracy {first['mean']:.1%} -> {last['mean']:.1%} ({gain:+.1f} points) on {last['n']} held-out tasks",
    )
    yield _row("", ", ".join(f"{task} {first[task]:.0%} -> {last[task]:.0%}" for task in TASKS if task in last))


def _stale(steps: Sequence[Metrics]) -> Iterator[str]:
    lags = [line["lag"] for line in steps if line.get("lag")]
    if not lags:
        return
    mean = sum(lag["mean"] for lag in lags) / len(lags)
    dropped, trained = _total(steps, "samples", "dropped"), _total(steps, "samples", "trained")
    yield _row(
        "stale",
        f"samples lagged {mean:.2f} optimizer steps on average, {max(lag['max'] for lag in lags)} at most "
        f"(bound {lags[-1]['bound']}); {dropped / max(1, dropped + trained):.1%} were dropped as too old",
    )


def _busy(lines: Sequence[Metrics]) -> Iterator[str]:
    spans = [
        (after["wall_seconds"] - before["wall_seconds"], after["busy"])
        for before, after in pairwise(lines)
        if after.get("busy")
    ]
    seconds = sum(span for span, _ in spans)
    if seconds <= 0:
        return
    shares = {name: sum(span * (busy.get(name) or 0.0) for span, busy in spans) / seconds for name in spans[-1][1]}
    yield _row("busy", ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + " of the time")


def _tokens(steps: Sequence[Metrics]) -> Iterator[str]:
    generated, trained = _total(steps, "tokens", "generated"), _total(steps, "tokens", "trained")
    seconds = max(steps[-1]["wall_seconds"], 1e-9)
    yield _row("tokens", f"{generated:,.0f} generated, {trained:,.0f} trained ({trained / seconds:,.0f} per second)")


def _weights(steps: Sequence[Metrics]) -> Iterator[str]:
    pushes = [line["weights"] for line in steps if line.get("weights")]
    errors = [push["canary_max_logp_error"] for push in pushes if push.get("canary_max_logp_error") is not None]
    pauses = sorted(push["pause_seconds"] for push in pushes if push.get("pause_seconds") is not None)
    if errors and pauses:
        yield _row(
            "weights",
            f"{len(pushes)} pushes; generation paused {1000 * pauses[len(pauses) // 2]:.0f} ms for one (median); "
            f"engine and learner agreed to {max(errors):.1e} nats",
        )


def _lost(restarts: Mapping[str, int]) -> Iterator[str]:
    if restarts:
        times = ", ".join(f"{name} {count} time{'s' if count > 1 else ''}" for name, count in sorted(restarts.items()))
        yield _row("restarts", f"{times}; what they had not finished was made again")


def _sandbox(lines: Sequence[Metrics]) -> Iterator[str]:
    weaknesses = [weakness for line in lines if (weakness := (line.get("sandbox") or {}).get("weakness"))]
    if weaknesses:
        yield _row("sandbox", weaknesses[-1])


def _files(run_dir: Path) -> Iterator[str]:
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    if checkpoints:
        yield _row("model", f"{checkpoints[-1]}")
    yield _row("files", f"{run_dir}: metrics.jsonl, journal.sqlite, logs/, tensorboard/")


def _total(lines: Sequence[Metrics], group: str, name: str) -> float:
    return float(sum((line.get(group) or {}).get(name) or 0 for line in lines))


def _row(name: str, text: str) -> str:
    return f"  {name:<9}{text}"
