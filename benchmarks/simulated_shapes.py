"""Shapes that this machine does not have, SIMULATED: how well does self-play keep both sides of a split busy?

The self-play program, its sandbox and its sockets are real. Engines and learner only sleep, for as long as their tokens
take at the speed given here, so each is a device of its own however few cores there are. Lengths vary as answers do.
"""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

import uvloop
from scripted_peers import SPAWN, Script, Step, compact_answer, scripted_learner, scripted_workers, self_play_process

from azr_async.config import Config

TOKENS: Final = 1000
"""Mean length of a completion."""
SPREAD: Final = 0.5
"""Of its logarithm: one answer in twenty is more than twice as long."""
PUSH_SHARE, PAUSE_SHARE = 0.02, 0.01
"""Of the time of a step: the learner's for a push, and the engines' for taking it."""
FIRST_STEPS: Final = 3
"""Not counted: the windows of an asynchronous run fill up before."""
HOSTS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A split, and how fast its sides are: both make `step_seconds` of a step's tokens, so they balance."""

    engines: int
    learners: int
    slots: int
    """Of each engine."""
    propose_samples: int
    solve_samples: int
    step_seconds: float

    @property
    def samples(self) -> int:
        """Of a step, all task kinds together."""
        return 3 * (self.propose_samples + self.solve_samples)

    @property
    def tokens_per_second(self) -> float:
        """Of either side when nothing makes it wait: the limit."""
        return self.samples * TOKENS / self.step_seconds


SHAPES: Final[dict[str, Shape]] = {
    "1+1": Shape(engines=1, learners=1, slots=128, propose_samples=8, solve_samples=96, step_seconds=2.0),
    "4+4": Shape(engines=4, learners=4, slots=64, propose_samples=16, solve_samples=192, step_seconds=4.0),
    "64+32": Shape(engines=64, learners=32, slots=8, propose_samples=24, solve_samples=288, step_seconds=6.0),
}


def simulated(shape: Shape, max_lag: int, seconds: float) -> dict[str, float]:
    """Rate, and where the time went, over at least so many seconds of a run of this shape."""
    config = _config(shape, max_lag)
    script = Script(
        answer=compact_answer,
        tokens=TOKENS,
        spread=SPREAD,
        slot_tokens_per_second=shape.tokens_per_second / (shape.engines * shape.slots),
        pause_seconds=PAUSE_SHARE * shape.step_seconds,
    )

    def is_over(steps: Sequence[Step]) -> bool:
        counted = len(steps) - FIRST_STEPS
        return counted > 1 and steps[-1].ended_seconds - steps[FIRST_STEPS - 1].ended_seconds >= seconds

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        version, wires_dir = SPAWN.Value("i", 0), Path(scratch) / "wires"
        wires_dir.mkdir(mode=0o700)
        stack.enter_context(self_play_process(config, Path(scratch) / "run", wires_dir))
        stack.enter_context(scripted_workers(config, wires_dir, script, version, processes=HOSTS))
        learner = scripted_learner(
            config,
            wires_dir,
            version,
            tokens_per_second=shape.tokens_per_second,
            push_seconds=PUSH_SHARE * shape.step_seconds,
            until=is_over,
        )
        steps = uvloop.run(learner)
    return _measured(steps, shape)


def _measured(steps: Sequence[Step], shape: Shape) -> dict[str, float]:
    counted = steps[FIRST_STEPS:]
    seconds = steps[-1].ended_seconds - steps[FIRST_STEPS - 1].ended_seconds
    tokens = sum(step.tokens for step in counted)
    pushing = PUSH_SHARE * shape.step_seconds * len(counted) / seconds
    waiting = sum(step.waited_seconds for step in counted) / seconds
    return {
        "trained_tokens_per_second": tokens / seconds,
        "steps": float(len(counted)),
        "learner_training": tokens / shape.tokens_per_second / seconds,
        "learner_pushing": pushing,
        "learner_waiting": waiting,
        "inference_computing": fmean(step.stats.get("busy.inference", math.nan) for step in counted),
        "sandbox_busy": fmean(step.stats.get("busy.sandbox", math.nan) for step in counted),
        "lag_mean": fmean(step.lag_mean for step in counted),
        "lag_max": float(max(step.lag_max for step in counted)),
    }


def _config(shape: Shape, max_lag: int) -> Config:
    return Config.model_validate(
        {
            "placement": {"inference_workers": shape.engines},
            "engine": {"slots": shape.slots, "kind": "transformers"},
            "flow": {
                "max_lag": max_lag,
                "propose_samples": shape.propose_samples,
                "solve_samples": shape.solve_samples,
            },
            "library": {"seed_tasks": 8},
            "evaluation": {"suite": "none"},
        }
    )
