"""What a run looks like while it goes: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from azr_async.messages import CELLS, ROLES, TASKS, Progress, cell_name

Metrics = Mapping[str, Any]
PLAIN_PHASE_SECONDS: Final = 5.0
RATE_STEPS: Final = 20
"""Tokens per second and the time left are averages over this many steps."""


@dataclass(slots=True)
class ViewState:
    """What is known about the run; filled by the launcher, read by the view."""

    steps: int
    processes: dict[str, str]
    """State of each program by name."""
    phases: dict[str, Progress] = field(default_factory=dict)
    recent: list[Metrics] = field(default_factory=list)
    """The last lines of metrics.jsonl, newest last."""
    first_evaluation: Metrics | None = None
    last_evaluation: Metrics | None = None
    is_stopping: bool = False
    new_lines: list[Metrics] = field(default_factory=list)
    """Lines that were not yet printed (plain output)."""
    news: list[str] = field(default_factory=list)
    """What happened that was not expected, oldest first."""

    def hear(self, progress: Progress) -> None:
        """A program said what it is doing."""
        self.phases[progress.process] = progress

    def take(self, lines: Sequence[Metrics], processes: Mapping[str, str]) -> None:
        """New lines of metrics.jsonl, and the programs' states."""
        self.processes = dict(processes)
        self.new_lines.extend(lines)
        self.recent = [*self.recent, *lines][-RATE_STEPS - 1 :]
        evaluations = [line["eval"] for line in lines if line.get("eval")]
        if evaluations:
            self.first_evaluation = self.first_evaluation or evaluations[0]
            self.last_evaluation = evaluations[-1]


class View:
    """Draws a ViewState. A terminal gets a panel that redraws itself, a file or a pipe gets a line per step."""

    def __init__(self, console: Console, state: ViewState) -> None:
        self._console, self._state = console, state
        self._started_at = time.monotonic()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._said: dict[str, tuple[Progress, float]] = {}
        self._news_said = 0
        self._has_said_stopping = False

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def redraw(self) -> None:
        """Show the state as it is now."""
        if self._live is None:
            for line in self._plain_lines():
                say(self._console, line)
            return
        self._state.new_lines.clear()
        with _outliving_its_readers(self._console):
            self._live.update(panel(self._state, time.monotonic() - self._started_at), refresh=True)

    def _plain_lines(self) -> list[str]:
        lines = [plain_line(metrics, self._state.steps) for metrics in self._state.new_lines]
        self._state.new_lines.clear()
        lines += self._state.news[self._news_said :]
        self._news_said = len(self._state.news)
        if self._state.is_stopping and not self._has_said_stopping:
            self._has_said_stopping = True
            lines.append("finishing the step, writing a checkpoint; Ctrl-C again stops at once")
        if self._state.recent and not lines:
            return []
        return [*self._new_phases(), *lines]

    def _new_phases(self) -> list[str]:
        """What programs do before the first step: each phase once, its count every few seconds."""
        now, lines = time.monotonic(), []
        for name, progress in self._state.phases.items():
            said, said_at = self._said.get(name, (None, 0.0))
            is_new = said is None or said.phase != progress.phase
            if not self._state.recent and (is_new or (said != progress and now - said_at > PLAIN_PHASE_SECONDS)):
                self._said[name] = (progress, now)
                lines.append(f"{name}: {phase_text(progress)}")
        return lines


def say(console: Console, text: str) -> None:
    """Print text as it is."""
    with _outliving_its_readers(console):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def plain_line(metrics: Metrics, steps: int) -> str:
    """One step in one line: `step 7/120   reward 0.12   lag 1.3 (max 2) ...`."""
    parts = [f"step {metrics['step']}/{steps}"]
    if weakness := (metrics.get("sandbox") or {}).get("weakness"):
        parts.insert(0, f"WARNING: {weakness}")
    rewards = _numbers(metrics.get("reward"))
    if rewards:
        parts.append(f"reward {sum(rewards) / len(rewards):.2f}")
    if lag := metrics.get("lag"):
        parts.append(f"lag {lag['mean']:.1f} (max {lag['max']}, bound {lag['bound']})")
    for key, name in (("valid_rate", "valid"), ("solve_rate", "solved")):
        if rates := _numbers(metrics.get(key)):
            parts.append(f"{name} {sum(rates) / len(rates):.0%}")
    if busy := metrics.get("busy"):
        parts.append("busy " + ", ".join(f"{name} {share:.0%}" for name, share in busy.items() if share is not None))
    if evaluation := metrics.get("eval"):
        parts.append(f"held-out accuracy {evaluation['mean']:.1%} of {evaluation['n']}")
    return "   ".join(parts)


def phase_text(progress: Progress) -> str:
    """`seeding 12/64`, or only `seeding` when there is nothing to count."""
    return f"{progress.phase} {progress.done}/{progress.total}" if progress.total else progress.phase


def panel(state: ViewState, elapsed_seconds: float) -> RenderableType:
    """The whole live view."""
    parts: list[RenderableType] = [_headline(state, elapsed_seconds)]
    if state.recent:
        parts += [Text(), _cells(state.recent[-1]), Text(), _flow(state)]
    parts += [Text(), _programs(state)]
    if state.news:
        parts += [Text(), Text(state.news[-1], style="yellow")]
    title = "stopping: the step at hand is finished and saved; Ctrl-C again stops at once" if state.is_stopping else ""
    return Panel(Group(*parts), title=title or "azr_async", border_style="yellow" if state.is_stopping else "cyan")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _outliving_its_readers(console: Console) -> Iterator[None]:
    try:
        yield
    except SystemExit:
        # rich wants to leave when nobody reads the output any more; the run is worth more than its view.
        console.quiet = True


def _headline(state: ViewState, elapsed_seconds: float) -> RenderableType:
    step = state.recent[-1]["step"] if state.recent else 0
    row = Table.grid(padding=(0, 2))
    left = _seconds_per_step(state)
    time_left = f"{duration(left * (state.steps - step))} left" if left is not None else ""
    row.add_row(
        Text(f"step {step}/{state.steps}", style="bold"),
        ProgressBar(total=state.steps, completed=step, width=40),
        f"{duration(elapsed_seconds)} gone",
        time_left,
    )
    return row


def _cells(metrics: Metrics) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_row("", *(Text(task, style="bold") for task in TASKS))
    for role in ROLES:
        rewards = metrics.get("reward") or {}
        cells = [rewards.get(cell_name(cell)) for cell in CELLS if cell[0] == role]
        table.add_row(f"reward, {role}", *(_signed(value) for value in cells))
    for key, name in (("valid_rate", "valid proposals"), ("solve_rate", "solved attempts")):
        rates = metrics.get(key) or {}
        table.add_row(name, *(_share(rates.get(task)) for task in TASKS))
    return table


def _flow(state: ViewState) -> Table:
    metrics = state.recent[-1]
    table = Table.grid(padding=(0, 3))
    if lag := metrics.get("lag"):
        table.add_row("lag", f"mean {lag['mean']:.2f}, max {lag['max']} of {lag['bound']} optimizer steps")
    busy = metrics.get("busy") or {}
    table.add_row("busy", "   ".join(f"{name} {_share(share)}" for name, share in busy.items()))
    table.add_row("tokens", _rates(state))
    if state.first_evaluation is not None and state.last_evaluation is not None:
        start, now = state.first_evaluation["mean"], state.last_evaluation["mean"]
        text = f"{now:.1%} (at the start {start:.1%}) on {state.last_evaluation['n']} tasks"
        table.add_row("held-out", Text(text, style="bold green" if now > start else "bold"))
    return table


def _programs(state: ViewState) -> Table:
    table = Table.grid(padding=(0, 3))
    colours = {
        "running": "green",
        "starting": "yellow",
        "restarting": "yellow",
        "leaving": "dim",
        "failed": "red",
        "ended": "dim",
    }
    for name, status in state.processes.items():
        progress = state.phases.get(name) if status in ("starting", "running") else None
        table.add_row(name, Text(status, style=colours.get(status, "")), phase_text(progress) if progress else "")
    return table


def _rates(state: ViewState) -> str:
    if len(state.recent) < 2:
        return ""
    seconds = state.recent[-1]["wall_seconds"] - state.recent[0]["wall_seconds"]
    later = state.recent[1:]
    rates = {
        name: sum((line.get("tokens") or {}).get(name) or 0 for line in later) / max(seconds, 1e-9)
        for name in ("generated", "trained")
    }
    return "   ".join(f"{rate:,.0f}/s {name}" for name, rate in rates.items())


def _seconds_per_step(state: ViewState) -> float | None:
    if len(state.recent) < 2:
        return None
    first, last = state.recent[0], state.recent[-1]
    steps = last["step"] - first["step"]
    return (last["wall_seconds"] - first["wall_seconds"]) / steps if steps > 0 else None


def _numbers(values: Mapping[str, float | None] | None) -> list[float]:
    return [value for value in (values or {}).values() if value is not None]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
