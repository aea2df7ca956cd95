"""The programs of a run as plain data: what is started, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

State = Literal["starting", "running", "restarting", "leaving", "ended", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramSpec:
    """One program to run, as plain data."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log_path: Path
    """Receives stdout and stderr."""
    ends_the_run: bool = False
    """When all programs with this mark have ended, the run is done."""
    is_told_to_stop: bool = False
    """Gets SIGTERM when the user wants to stop; the others end because their channels close."""
    max_restarts: int = 0
    """How often it is started again when it is lost while the run goes on."""
    is_spare: bool = False
    """The run goes on without it when it is lost for good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """How long the supervisor waits, in seconds."""

    start_seconds: float
    """Until every program was heard of."""
    stop_seconds: float
    """After the user's wish to stop, until programs are killed."""
    linger_seconds: float
    """After the run is done, for the programs that only served it."""
    grace_seconds: float = 3.0
    """Between SIGTERM and SIGKILL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A program that is no more."""

    name: str
    status: int
    """Exit status, or minus the signal that killed it."""
    at_seconds: float
    """When, on this host's monotonic clock."""
    was_told: bool
    """The supervisor had already signalled it."""
    was_silent: bool = False
    """It was killed because it had not answered for too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A program was lost, and will be started again."""

    ended: Ended
    number: int
    """How often it was lost by now."""
    after_seconds: float
    """When it will be started again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """How a run ended."""

    kind: Literal["done", "failed", "interrupted"]
    programs: tuple[Ended, ...]
    """Programs that ended by themselves and were not started again, in the order in which they did."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    """How often programs were lost without ending the run."""
    complaint: str = ""
    """Set when a run failed although no program did."""
    killed: tuple[str, ...] = ()
    """Programs that had to be killed."""
