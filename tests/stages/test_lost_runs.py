"""What the sandbox could not run is left out: nobody is trained on it, and nothing waits for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.library import Library, identity_problem
from azr_async.config import ProposeConfig
from azr_async.messages import (
    Admission,
    Attempt,
    Challenge,
    Draft,
    Judged,
    Outcome,
    Proposal,
    Rejected,
    Rollout,
)
from azr_async.stages.advantage import advantage
from azr_async.stages.validate import validate
from azr_async.stages.verify import verify
from tests.completions import a_completion

T = TypeVar("T")

ADMISSION = Admission(group_id=1, task="deduction", is_proposal=True, trained_attempts=2, version=0)
PROPOSAL = Proposal(
    admission=ADMISSION,
    references=(),
    completion=a_completion("1"),
    draft=Draft(task="deduction", program="def f(x): return x", inputs=("1",)),
)


@dataclass
class OverloadedHost:
    """A sandbox on a host that kills what runs, so often that the sandbox gives up."""

    literals_left: int = 0

    async def run(self, program: str, inputs: Sequence[str], *, times: int = 1) -> list[Outcome]:
        return [Outcome(status="lost", error="killed") for _ in inputs]

    async def literal(self, text: str) -> Outcome:
        self.literals_left -= 1
        if self.literals_left >= 0:
            return Outcome(status="ok", value=identity_problem("deduction").pairs[0].value)
        return Outcome(status="lost", error="killed")


def channel(kind: type[T]) -> tuple[MemorySender[T], MemoryReceiver[T]]:
    return memory_channel(kind.__name__, 9, deadline_seconds=20.0)


async def test_a_lost_proposal_is_not_held_against_its_author() -> None:
    proposals, proposed = channel(Proposal)
    challenges, challenged = channel(Challenge)
    rejections, rejected = channel(Rejected)
    async with proposals:
        await proposals.send(PROPOSAL)
    await validate(
        proposed,
        challenges,
        rejections,
        sandbox=OverloadedHost(),
        library=Library(capacity=9, seed=0),
        journal=SqliteJournal(Path(":memory:")),
        config=ProposeConfig(),
        attempts=1,
        held_out_programs=[],
    )
    (item,) = [item async for item in rejected]
    assert (item.reason, item.is_trained) == ("lost", False)
    assert [item async for item in challenged] == []


async def samples(*, judged: int, of: int) -> tuple[list[Judged], list[Rollout]]:
    """What becomes of a proposal's group of which only so many attempts can be judged, each of them right."""
    challenge = Challenge(
        group_id=1, problem=identity_problem("deduction"), proposal=PROPOSAL, attempts=of, trained_attempts=2
    )
    attempts, attempted = channel(Attempt)
    judgements, judged_ones = channel(Judged)
    rejections, rejected = channel(Rejected)
    async with attempts, rejections:
        for index in range(of):
            await attempts.send(Attempt(challenge=challenge, completion=a_completion(f"{index}")))
    host = OverloadedHost(literals_left=judged)
    await verify(attempted, judgements, sandbox=host, dialogue=make_dialogue("compact"), float_tolerance=0.0)
    groups: list[tuple[list[Judged], list[Rollout]]] = []
    await advantage(
        judged_ones,
        rejected,
        on_group=lambda _, items, rollouts: groups.append((items, rollouts)),
        on_rejected=lambda _, rollouts: None,
        proposer_extreme=0.0,
    )
    (group,) = groups
    return group


async def test_lost_attempts_are_left_out_of_their_group() -> None:
    items, rollouts = await samples(judged=1, of=3)
    assert [item.reward for item in items] == [1.0]
    assert [(rollout.role, rollout.reward) for rollout in rollouts] == [("solve", 1.0)]


async def test_a_proposal_is_rewarded_only_where_all_of_its_attempts_were_judged() -> None:
    _, rollouts = await samples(judged=3, of=3)
    assert [(rollout.role, rollout.reward) for rollout in rollouts] == [("solve", 1.0)] * 2 + [("propose", 0.0)]


async def test_a_group_in_which_nothing_could_be_judged_is_whole_and_trains_nobody() -> None:
    assert await samples(judged=0, of=3) == ([], [])
