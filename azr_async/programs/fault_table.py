"""What many broken runs have shown: the table for people, and the same as JSON."""

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

from rich.table import Table

from azr_async.algorithm.fault_schedule import KINDS
from azr_async.programs.fault_run import Inflicted, Outcome, Story
from azr_async.programs.placement import describe_host

COLUMNS: Final[tuple[Outcome, ...]] = ("went on", "ended by name, resumed", "killed, resumed", "hang", "missed")
PACKAGES: Final = ("azr_async", "torch", "transformers", "pyzmq")


def target_kind(target: str) -> str:
    """The target without the numbers of processes: `selfplay-results from inference-1` -> `selfplay-results`."""
    wire, _, _ = target.partition(" from ")
    return "-".join(part for part in wire.split("-") if not part.isdecimal())


def table(stories: Sequence[Story]) -> Table:
    """Kind and target against what became of the runs."""
    counts: Counter[tuple[str, str, Outcome]] = Counter(
        (one.fault.kind, target_kind(one.fault.target), one.outcome) for one in _all(stories)
    )
    rows = sorted({key[:2] for key in counts}, key=lambda row: (KINDS.index(row[0]), row[1]))
    shown = Table("fault", "target", "inflicted", *COLUMNS, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        numbers = [counts[*row, column] for column in COLUMNS]
        shown.add_row(*row, str(sum(numbers) - numbers[-1]), *(str(number or "") for number in numbers))
    totals = [sum(counts[*row, column] for row in rows) for column in COLUMNS]
    shown.add_row("all", "", str(sum(totals) - totals[-1]), *map(str, totals))
    return shown


def report(stories: Sequence[Story], *, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Everything, for a program to read."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "arguments": list(arguments),
        "machine": f"{platform.machine()}, {describe_host(0)}, Linux {platform.release()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "inflicted": inflicted(stories),
        "violations": sum(len(story.violations) for story in stories),
        "hangs": sum(story.hangs for story in stories),
        "runs": [
            {
                "number": story.plan.number,
                "run_dir": str(story.run_dir),
                "workers": story.plan.workers,
                "ranks": story.plan.ranks,
                "max_lag": story.plan.max_lag,
                "attempts": story.attempts,
                "seconds": round(story.seconds, 1),
                "violations": story.violations,
                "faults": [
                    asdict(one.fault)
                    | {"step_seen": one.step, "hit": one.done.what, "outcome": one.outcome, "error": one.error}
                    for one in story.inflicted
                ],
            }
            for story in stories
        ],
    }


def inflicted(stories: Iterable[Story]) -> int:
    """Faults that have hit something."""
    return sum(bool(one.done.what) for one in _all(stories))


def _all(stories: Iterable[Story]) -> list[Inflicted]:
    return [one for story in stories for one in story.inflicted]
