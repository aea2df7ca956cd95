"""What a simulated run is made of, and what comes out of it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from azr_async.messages import Cell, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is, and how long it takes. Seconds are CPU seconds where `cores` are shared, else wall time."""

    engines: int
    slots: int
    step_seconds: float
    """Of an engine's step, whatever the number of its rows; a token for each of them."""
    row_seconds: float
    """More per row."""
    prefill_seconds: float
    """Of the prefill of any number of prompts that begin together."""
    prompt_seconds: float
    """More per prompt."""
    sandbox_workers: int
    check_seconds: float
    """One run of a program in the sandbox."""
    file_seconds: float
    """Of self-play's thread, per sample."""
    learner_seconds: float
    """Of a training step, whatever its size."""
    learner_token_seconds: float
    """More per trained token; of all ranks together, side by side."""
    push_seconds: float
    """From the end of a step until the engines have its weights, without their pause."""
    pause_seconds: float
    """In which an engine samples nothing, per push; where cores are shared, what it costs to take weights over."""
    cores: float | None = None
    """Shared by all of this; None: every part has a device of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellLoad:
    """Samples of one (role, task) cell."""

    tokens: float
    """Mean length of a completion."""
    tokens_std: float
    checks: float
    """Mean number of sandbox runs for a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is generated, judged and trained."""

    max_lag: int
    propose_samples: int
    solve_samples: int
    attempts: int
    trained_attempts: int
    tasks: tuple[Task, ...]
    cells: Mapping[Cell, CellLoad]
    valid_rate: float
    """Share of proposals that are valid."""
    late: Literal["wait", "drop"] = "wait"
    ess_loss: float = 0.0
    """ess = 1 / (1 + ess_loss x mean lag)."""
    evaluated_samples: int = 0
    """Held-out samples of an evaluation, which the next push waits for."""
    evaluated_proposals: int = 0
    """Proposals that it asks for, too."""
    evaluated_every: int = 0
    """Steps; 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step of the model run."""

    seconds: float
    trained_tokens: int
    lag_mean: float
    lag_max: int
    ess: float
    busy_seconds: Mapping[str, float]
    """Since the beginning of the run, as in `Outcome`."""


@dataclass(slots=True)
class Outcome:
    """All of a model run."""

    steps: list[Step] = field(default_factory=list)
    busy_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of `inference`, `sandbox` and `learner`, added up over those that work side by side."""
    seconds: float = 0.0
    dropped: int = 0
