"""What a self-play loop is made of, and its four stages that ask an engine or the sandbox, over these parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.jobs import loop_seed
from azr_async.algorithm.library import Library
from azr_async.algorithm.validity import program_key
from azr_async.config import Config
from azr_async.messages import Admission, Attempt, Challenge, Handover, Judged, Problem, Proposal, Rejected
from azr_async.ports import Dialogue, Engine, Receiver, Sandbox, Sender
from azr_async.programs.standing import Standing
from azr_async.stages.propose import propose
from azr_async.stages.solve import solve
from azr_async.stages.validate import validate
from azr_async.stages.verify import verify

T = TypeVar("T")

CHANNEL_CAPACITY = 64
"""Messages between two stages. Waits between stages have no deadline of their own: the waits on engines, sandbox and
learner, from which they follow, have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What one self-play loop is made of; every adapter behind its port."""

    config: Config
    engine: Engine
    sandbox: Sandbox
    dialogue: Dialogue
    journal: SqliteJournal
    library: Library
    suite: Sequence[Problem]
    """Held-out problems, judged on request and never trained on."""
    usage: Callable[[], Mapping[str, float]]
    """Running totals of the adapters: seconds busy and tokens generated."""
    gauges: Callable[[], Mapping[str, float]]
    """What else the adapters count, as flat metric names."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What the adapters tell once, in words, under such names."""
    report: Callable[[str, int, int], None]
    """Tells phase, done, total to whoever watches."""
    group_ids: Iterator[int]
    """Groups outside the flow (seeding, evaluation) count down from -1, so that they go first."""
    start_version: int
    """Of the weights with which this loop begins: 0, or the version that the run was resumed at."""
    standing: Standing | None = None
    """Where an earlier process stood at `start_version`, if the run goes on from there."""
    max_lag: int | None = None
    """Staleness bound to begin with, where the learner says it; else the largest that the configuration allows."""
    handover: Handover | None = None
    """What the learner says, if it goes on while self-play was started again."""

    @property
    def seed(self) -> int:
        """Of everything that this loop draws."""
        return self.standing.seed if self.standing else loop_seed(self.config.run.seed, self.start_version)

    @property
    def held_out_programs(self) -> frozenset[str]:
        """Programs that self-play must not learn from, should it invent them again."""
        return frozenset(program_key(problem.program) for problem in self.suite)


def channel(kind: type[T]) -> tuple[MemorySender[T], MemoryReceiver[T]]:
    """A channel between two stages, called after what flows in it."""
    return memory_channel(kind.__name__, CHANNEL_CAPACITY, deadline_seconds=None)


async def run_propose(parts: Parts, admitted: Receiver[Admission], proposals: Sender[Proposal]) -> None:
    """The propose stage over these parts."""
    await propose(
        admitted,
        proposals,
        engine=parts.engine,
        dialogue=parts.dialogue,
        library=parts.library,
        config=parts.config.propose,
        seed=parts.seed,
    )


async def run_validate(
    parts: Parts, proposed: Receiver[Proposal], challenges: Sender[Challenge], rejections: Sender[Rejected]
) -> None:
    """The validate stage over these parts."""
    await validate(
        proposed,
        challenges,
        rejections,
        sandbox=parts.sandbox,
        library=parts.library,
        journal=parts.journal,
        config=parts.config.propose,
        attempts=parts.config.solve.attempts,
        held_out_programs=parts.held_out_programs,
    )


async def run_solve(
    parts: Parts, challenged: Receiver[Challenge], attempts: Sender[Attempt], *, greedy: bool = False
) -> None:
    """The solve stage over these parts; `greedy` is for evaluation."""
    config = parts.config.solve
    if greedy:
        config = config.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    await solve(
        challenged,
        attempts,
        engine=parts.engine,
        dialogue=parts.dialogue,
        config=config,
        seed=parts.seed,
    )


async def run_verify(parts: Parts, attempted: Receiver[Attempt], judgements: Sender[Judged]) -> None:
    """The verify stage over these parts."""
    await verify(
        attempted,
        judgements,
        sandbox=parts.sandbox,
        dialogue=parts.dialogue,
        float_tolerance=parts.config.reward.float_tolerance,
    )
