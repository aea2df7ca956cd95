"""Proposals through the real sandbox: who is to blame decides who is trained."""

from pathlib import Path

import pytest

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.library import Library
from azr_async.config import ProposeConfig
from azr_async.messages import Admission, Challenge, Draft, Finish, Malformed, Proposal, Rejected
from azr_async.stages.validate import validate
from tests.completions import a_completion

HELD_OUT = "def f(x):\n    return x + 7"


def proposal(draft: Draft | Malformed, finish: Finish = "stop") -> Proposal:
    completion = a_completion(finish=finish)
    admission = Admission(group_id=1, task="deduction", is_proposal=True, trained_attempts=1, version=0)
    return Proposal(admission=admission, references=(), completion=completion, draft=draft)


def draft(program: str) -> Draft:
    return Draft(task="deduction", program=program, inputs=("1",))


@pytest.mark.parametrize(
    ("given", "reason", "is_trained"),
    [
        (proposal(draft(HELD_OUT)), "held_out", False),
        (proposal(Malformed(reason=""), "prompt_too_long"), "prompt_too_long", False),
        (proposal(Malformed(reason="")), "malformed", True),
        (proposal(draft("def f(x):\n    return y")), "error", True),
        (proposal(draft("def f(x):\n    return id([x])")), "nondeterministic", True),
        (proposal(draft("import os\ndef f(x):\n    return x")), "rejected", True),
    ],
)
async def test_a_proposal_that_is_no_task_is_trained_on_only_if_its_author_is_to_blame(
    given: Proposal, reason: str, is_trained: bool
) -> None:
    proposals: tuple[MemorySender[Proposal], MemoryReceiver[Proposal]]
    challenges: tuple[MemorySender[Challenge], MemoryReceiver[Challenge]]
    rejections: tuple[MemorySender[Rejected], MemoryReceiver[Rejected]]
    proposals = memory_channel("proposals", 2, deadline_seconds=20.0)
    challenges = memory_channel("challenges", 2, deadline_seconds=20.0)
    rejections = memory_channel("rejections", 2, deadline_seconds=20.0)
    async with proposals[0]:
        await proposals[0].send(given)
    async with SandboxPool(workers=1, label="test_validate") as sandbox:
        await validate(
            proposals[1],
            challenges[0],
            rejections[0],
            sandbox=sandbox,
            library=Library(capacity=9, seed=0),
            journal=SqliteJournal(Path(":memory:")),
            config=ProposeConfig(),
            attempts=1,
            held_out_programs=[HELD_OUT],
        )
    (rejected,) = [item async for item in rejections[1]]
    assert (rejected.reason, rejected.is_trained) == (reason, is_trained)
    assert [item async for item in challenges[1]] == []
