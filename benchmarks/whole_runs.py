"""What benchmarks of whole runs share: start `run.py`, read its files, name the machine."""

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_SECONDS_MOST = 1800.0


def run(output: Path, *options: str) -> list[dict[str, Any]]:
    """One whole run, a new set of processes; returns the lines of its metrics.jsonl.

    Raises SystemExit with the run's own last words when it fails.
    """
    command = [sys.executable, str(REPOSITORY / "run.py"), "--output", str(output), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS_MOST, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {finished.returncode}:\n{finished.stderr[-2000:]}")
    return read_lines(output / "metrics.jsonl")


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


def write_json(path: Path | None, name: str, results: Mapping[str, Any] | Sequence[Any]) -> None:
    """The results beside the machine they come from; nothing without a path."""
    if path is not None:
        text = json.dumps({"benchmark": name, "machine": machine(), "results": results}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
