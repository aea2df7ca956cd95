"""Metrics: JSON lines that are complete or absent, and accelerate's trackers."""

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from azr_async.errors import AzrError, ConfigError

Record = Mapping[str, Any]

METRICS_FILE: Final = "metrics.jsonl"
EVALUATIONS_FILE: Final = "evaluations.jsonl"

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonLines:
    """Appends one object per line; a line is whole on the disk's side of the system, or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)

    def write(self, record: Record) -> None:
        """Append and hand to the system at once. NaN and infinity, which JSON lacks, become null.

        Raises:
            AzrError: the disk is full; the line is not there.
        """
        line = json.dumps(_json(record), allow_nan=False).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            if error.errno not in _DISK_FULL:
                raise
            raise AzrError(
                f"the disk is full: {self.path} cannot grow. Free some space, then resume from the last checkpoint."
            ) from error


class Trackers:
    """The same numbers for dashboards: TensorBoard, or another tracker of accelerate by name."""

    def __init__(self, names: Sequence[str], run_dir: Path) -> None:
        """Raises ConfigError when a tracker's package is not installed."""
        installed = {str(name) for name in get_available_trackers()}
        for name in names:
            if name not in installed:
                raise ConfigError(
                    f"telemetry.trackers names {name}, but its package is not installed. "
                    f"Run `pip install {name}`, or leave it out."
                )
        self._trackers: list[GeneralTracker] = [_tracker(name, run_dir) for name in names]

    def __enter__(self) -> Self:
        for tracker in self._trackers:
            tracker.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def log(self, record: Record, step: int) -> None:
        """Send the record's numbers, under names like `reward/solve_deduction`."""
        flat = flattened(record)
        for tracker in self._trackers:
            tracker.log(flat, step=step)


def truncate_after(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`, for a run that continues from there. No file is fine."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    draft = path.with_name(f".{path.name}.writing")
    draft.write_bytes(b"".join(kept))
    draft.rename(path)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"tokens.trained": 5}` -> `{"tokens": {"trained": 5}}`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


def flattened(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record, names joined by `/`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[f"{prefix}{name}"] = value
    return flat


def _tracker(name: str, run_dir: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        return kind(run_name=name, logging_dir=run_dir)
    return kind(run_name=run_dir.name)


def _json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
