"""Every stage, cancelled while it waits for the engine or the sandbox, leaves neither task nor message behind."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from itertools import count

import pytest

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.library import Library, identity_problem
from azr_async.algorithm.staleness import Flow
from azr_async.config import ProposeConfig, SolveConfig
from azr_async.messages import (
    TASKS,
    Admission,
    Attempt,
    BatchRequest,
    Challenge,
    Completion,
    Draft,
    GenerateJob,
    Judged,
    Outcome,
    Problem,
    Proposal,
    Rejected,
    RolloutBatch,
)
from azr_async.stages.advantage import advantage
from azr_async.stages.flow import Changed, admit, supply
from azr_async.stages.grow import grow
from azr_async.stages.propose import propose
from azr_async.stages.solve import solve
from azr_async.stages.validate import validate
from azr_async.stages.verify import verify
from tests.completions import a_completion


class Never:
    """An engine, a sandbox and a journal that take the work and never answer; they count who still waits."""

    def __init__(self) -> None:
        self.waiting = 0
        self.reached = asyncio.Event()

    async def _wait(self) -> None:
        self.waiting += 1
        self.reached.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.waiting -= 1

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        await self._wait()
        yield completion()

    async def run(self, program: str, inputs: Sequence[str], *, times: int = 1) -> list[Outcome]:
        await self._wait()
        return []

    async def literal(self, text: str) -> Outcome:
        await self._wait()
        return Outcome(status="ok")

    async def add(
        self, problem: Problem, *, version: int, group_id: int | None = None, parents: Collection[Problem] = ()
    ) -> None:
        await self._wait()


def completion() -> Completion:
    return a_completion("1")


ADMISSION = Admission(group_id=1, task="deduction", is_proposal=True, trained_attempts=1, version=0)
CHALLENGE = Challenge(group_id=1, problem=identity_problem("deduction"), proposal=None, attempts=1, trained_attempts=1)
DIALOGUE = make_dialogue("compact")


def channel(kind: type, *messages: object) -> tuple[MemorySender, MemoryReceiver]:  # type: ignore[type-arg]
    return memory_channel(kind.__name__, 8, deadline_seconds=None)


async def filled(kind: type, *messages: object) -> MemoryReceiver:  # type: ignore[type-arg]
    sender, receiver = channel(kind)
    for message in messages:
        await sender.send(message)
    return receiver


async def cancelled_while_waiting(stage: Awaitable[None], never: Never) -> None:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(stage)  # type: ignore[arg-type]
        await never.reached.wait()
        task.cancel()
    assert task.cancelled()
    assert never.waiting == 0


async def test_propose() -> None:
    never, (proposals, proposed) = Never(), channel(Proposal)
    library = Library(capacity=9, seed=0)
    admitted = await filled(Admission, ADMISSION)
    stage = propose(
        admitted, proposals, engine=never, dialogue=DIALOGUE, library=library, config=ProposeConfig(), seed=1
    )
    await cancelled_while_waiting(stage, never)
    assert [message async for message in proposed] == []


async def test_validate() -> None:
    never, (challenges, challenged), (rejections, rejected) = Never(), channel(Challenge), channel(Rejected)
    draft = Draft(task="deduction", program="def f(x):\n    return x", inputs=("1",))
    proposal = Proposal(admission=ADMISSION, references=(), completion=completion(), draft=draft)
    stage = validate(
        await filled(Proposal, proposal),
        challenges,
        rejections,
        sandbox=never,
        library=Library(capacity=9, seed=0),
        journal=never,
        config=ProposeConfig(),
        attempts=1,
        held_out_programs=(),
    )
    await cancelled_while_waiting(stage, never)
    assert [message async for message in challenged] == []
    assert [message async for message in rejected] == []


async def test_solve() -> None:
    never, (attempts, attempted) = Never(), channel(Attempt)
    stage = solve(
        await filled(Challenge, CHALLENGE), attempts, engine=never, dialogue=DIALOGUE, config=SolveConfig(), seed=1
    )
    await cancelled_while_waiting(stage, never)
    assert [message async for message in attempted] == []


async def test_verify() -> None:
    never, (judgements, judged) = Never(), channel(Judged)
    attempts = await filled(Attempt, Attempt(challenge=CHALLENGE, completion=completion()))
    stage = verify(attempts, judgements, sandbox=never, dialogue=DIALOGUE, float_tolerance=0.0)
    await cancelled_while_waiting(stage, never)
    assert [message async for message in judged] == []


def flow() -> Flow:
    return Flow(max_lag=0, propose_samples=1, solve_samples=1, trained_attempts=1, tasks=TASKS)


def never_called(*arguments: object) -> None:
    raise AssertionError(f"called with {arguments}")


def stage_that_only_waits(name: str) -> Callable[[], Awaitable[None]]:
    admissions, challenges = channel(Admission), channel(Challenge)
    judged, rejected, requests, batches = (
        channel(Judged),
        channel(Rejected),
        channel(BatchRequest),
        channel(RolloutBatch),
    )
    library = Library(capacity=9, seed=0)
    stages: dict[str, Callable[[], Awaitable[None]]] = {
        "admit": lambda: admit(
            admissions[0],
            challenges[0],
            flow=flow(),
            library=library,
            changed=Changed(),
            stop=asyncio.Event(),
            on_admitted=lambda admission: None,
        ),
        "supply": lambda: supply(
            requests[1],
            batches[0],
            flow=flow(),
            library=library,
            changed=Changed(),
            on_batch=never_called,
            on_dropped=never_called,
            stats=dict,
            notes={},
        ),
        "advantage": lambda: advantage(
            judged[1], rejected[1], on_group=never_called, on_rejected=never_called, proposer_extreme=0.0
        ),
        "grow": lambda: grow(
            admissions[0],
            challenges[1],
            rejected[1],
            library=library,
            tasks=TASKS,
            target=2,
            proposal_limit=9,
            side_by_side=1,
            group_ids=count(-1, -1),
            version=0,
            on_progress=lambda done, total: None,
        ),
    }
    return stages[name]


@pytest.mark.parametrize("name", ["admit", "supply", "advantage", "grow"])
async def test_stages_that_wait_for_messages(name: str) -> None:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(stage_that_only_waits(name)())  # type: ignore[arg-type]
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
    assert task.cancelled()
