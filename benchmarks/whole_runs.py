"""What benchmarks of whole runs share: start `run.py`, read its files, name the machine."""

import datetime as dt
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_SECONDS_MOST = 1800.0
WATCH_SECONDS = 0.5


def run(
    output: Path,
    *options: str,
    seconds_most: float = RUN_SECONDS_MOST,
    watch: Callable[[psutil.Process], None] | None = None,
) -> list[dict[str, Any]]:
    """One whole run, a new set of processes; returns the lines of its metrics.jsonl.

    `watch` is called with the run's first process, twice a second while it lasts.
    Raises SystemExit with the run's own last words when it fails, or takes longer than `seconds_most`.
    """
    command = [sys.executable, str(REPOSITORY / "run.py"), "--output", str(output), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            words = _last_words(process, seconds_most, watch)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{words[-2000:]}")
    return read_lines(output / "metrics.jsonl")


def _last_words(
    process: subprocess.Popen[str], seconds_most: float, watch: Callable[[psutil.Process], None] | None
) -> str:
    """What it writes to stderr until it ends."""
    ends = time.monotonic() + seconds_most
    while True:
        try:
            return process.communicate(timeout=WATCH_SECONDS)[1]
        except subprocess.TimeoutExpired:
            if time.monotonic() > ends:
                raise SystemExit(f"the run {process.args!r} took longer than {seconds_most:g} s") from None
        if watch is not None:
            watch(psutil.Process(process.pid))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def machine() -> dict[str, str | int | None]:
    """Where and with what a result was measured."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "pyzmq")},
    }


def write_json(path: Path | None, name: str, results: Mapping[str, Any] | Sequence[Any], **more: object) -> None:
    """The results beside the machine they come from; nothing without a path. The file is whole at every moment."""
    if path is not None:
        text = json.dumps({"benchmark": name, "machine": machine(), **more, "results": results}, indent=1)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)


def save_figure(figure: "Figure", path: Path) -> None:
    """As PNG, with the day and the machine at its foot."""
    here = machine()
    figure.supxlabel(f"{here['date']}, {here['cores']} cores, {here['processor']}", fontsize=8)
    figure.savefig(path, dpi=120)
