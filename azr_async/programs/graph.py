"""Self-play as a graph: the stages, their channels, one TaskGroup. It runs over any engine, sandbox and learner.

          ┌─────────────── tasks of the library ────────────┐
admit ────┴─► propose ─► validate ─────► solve ─► verify ─► advantage ─► supply ─► learner
                            └──── not a valid task ────────────┘
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.algorithm.judging import RIGHT
from azr_async.algorithm.library import Library
from azr_async.algorithm.staleness import Flow
from azr_async.algorithm.validity import program_key
from azr_async.config import Config
from azr_async.messages import (
    Admission,
    Attempt,
    BatchRequest,
    Challenge,
    EvaluationRequest,
    EvaluationResult,
    Judged,
    Problem,
    Proposal,
    Rejected,
    RolloutBatch,
    Task,
    WeightsReady,
)
from azr_async.ports import Dialogue, Engine, Journal, Receiver, Sandbox, Sender
from azr_async.programs.filing import Filing
from azr_async.stages.advantage import advantage
from azr_async.stages.flow import Changed, admit, supply
from azr_async.stages.grow import grow
from azr_async.stages.propose import propose
from azr_async.stages.solve import solve
from azr_async.stages.validate import validate
from azr_async.stages.verify import verify

Request = BatchRequest | EvaluationRequest | WeightsReady
Reply = RolloutBatch | EvaluationResult

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
    journal: Journal
    library: Library
    suite: Sequence[Problem]
    """Held-out problems, judged on request and never trained on."""
    usage: Callable[[], Mapping[str, float]]
    """Running totals of the adapters: seconds busy and tokens generated."""
    report: Callable[[str, int, int], None]
    """Tells phase, done, total to whoever watches."""
    group_ids: Iterator[int]
    """Groups outside the flow (seeding, evaluation) count down from -1, so that they go first."""

    @property
    def held_out_programs(self) -> frozenset[str]:
        """Programs that self-play must not learn from, should it invent them again."""
        return frozenset(program_key(problem.program) for problem in self.suite)


async def self_play(parts: Parts, requests: Receiver[Request], replies: Sender[Reply], *, stop: asyncio.Event) -> None:
    """Serve the learner until it closes `requests`; then everything else is cancelled and leaves nothing behind.

    The learner's first message is WeightsReady: from then on the engines hold the weights it trains.
    `stop` ends admission; what is on its way is still delivered.
    """
    flow = _flow(parts.config)
    changed = Changed()
    batch_requests, wanted = _channel(BatchRequest)
    ready = asyncio.Event()

    async def work() -> None:
        await ready.wait()
        await seed(parts)
        await _stages(parts, flow, changed, wanted, replies, stop)

    async def wake_admission_to_stop() -> None:
        await stop.wait()
        changed.notify()

    async with replies, batch_requests, asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(), name="work"), group.create_task(wake_admission_to_stop(), name="stop")]
        async for request in requests:
            match request:
                case BatchRequest():
                    await batch_requests.send(request)
                case WeightsReady():
                    flow.installed(request.version)
                    changed.notify()
                    ready.set()
                case EvaluationRequest():
                    tasks.append(group.create_task(_answer(parts, request, replies), name="evaluate"))
        for task in tasks:
            task.cancel()


async def seed(parts: Parts) -> None:
    """Let the untrained policy fill the library; induction comes last, since it needs programs of the others."""
    config, library = parts.config, parts.library
    for kinds in (("deduction", "abduction"), ("induction",)):
        tasks: list[Task] = [task for task in config.flow.tasks if task in kinds]
        admissions, admitted = _channel(Admission)
        proposals, proposed = _channel(Proposal)
        challenges, valid = _channel(Challenge)
        rejections, invalid = _channel(Rejected)
        async with asyncio.TaskGroup() as group:
            group.create_task(_propose(parts, admitted, proposals), name="seed-propose")
            group.create_task(_validate(parts, proposed, challenges, rejections), name="seed-validate")
            await grow(
                admissions,
                valid,
                invalid,
                library=library,
                tasks=tasks,
                target=config.library.seed_tasks,
                proposal_limit=config.library.seed_proposals,
                side_by_side=config.engine.slots,
                group_ids=parts.group_ids,
                on_progress=partial(parts.report, f"seeding {' and '.join(tasks)}"),
            )


async def evaluate(parts: Parts) -> tuple[bool, ...]:
    """Which of the held-out problems the current weights solve greedily, in the suite's order."""
    order = {next(parts.group_ids): index for index, _ in enumerate(parts.suite)}
    solved = [False] * len(parts.suite)
    challenges, challenged = _channel(Challenge)
    attempts, attempted = _channel(Attempt)
    judgements, judged = _channel(Judged)

    async def ask() -> None:
        async with challenges:
            for group_id, index in order.items():
                problem = parts.suite[index]
                await challenges.send(
                    Challenge(group_id=group_id, problem=problem, proposal=None, attempts=1, trained_attempts=0)
                )

    async with asyncio.TaskGroup() as group:
        group.create_task(ask(), name="evaluate-ask")
        group.create_task(_solve(parts, challenged, attempts, greedy=True), name="evaluate-solve")
        group.create_task(_verify(parts, attempted, judgements), name="evaluate-verify")
        async for item in judged:
            solved[order[item.attempt.challenge.group_id]] = item.reward == RIGHT
    return tuple(solved)


async def _answer(parts: Parts, request: EvaluationRequest, replies: Sender[Reply]) -> None:
    solved = await evaluate(parts)
    tasks = tuple(problem.task for problem in parts.suite)
    await replies.send(EvaluationResult(version=request.version, tasks=tasks, solved=solved))


async def _stages(
    parts: Parts,
    flow: Flow,
    changed: Changed,
    wanted: Receiver[BatchRequest],
    replies: Sender[Reply],
    stop: asyncio.Event,
) -> None:
    """The graph at the top of this file."""
    filing = Filing(
        flow,
        parts.library,
        tasks=parts.config.flow.tasks,
        usage=parts.usage,
        widths={"busy.inference": parts.config.inference_workers, "busy.sandbox": parts.config.sandbox.workers},
        on_change=changed.notify,
    )
    admissions, admitted = _channel(Admission)
    proposals, proposed = _channel(Proposal)
    challenges, challenged = _channel(Challenge)
    rejections, rejected = _channel(Rejected)
    attempts, attempted = _channel(Attempt)
    judgements, judged = _channel(Judged)
    async with asyncio.TaskGroup() as group:
        for name, stage in {
            "admit": admit(
                admissions, challenges.clone(), flow=flow, library=parts.library, changed=changed, stop=stop
            ),
            "propose": _propose(parts, admitted, proposals),
            "validate": _validate(parts, proposed, challenges, rejections),
            "solve": _solve(parts, challenged, attempts),
            "verify": _verify(parts, attempted, judgements),
            "advantage": advantage(
                judged,
                rejected,
                on_group=filing.group,
                on_rejected=filing.rejected,
                proposer_extreme=parts.config.reward.proposer_extreme,
            ),
            "supply": supply(
                wanted,
                replies,
                flow=flow,
                library=parts.library,
                changed=changed,
                on_dropped=filing.dropped,
                stats=filing.stats,
            ),
        }.items():
            group.create_task(stage, name=name)


def _flow(config: Config) -> Flow:
    return Flow(
        max_lag=config.flow.max_lag,
        propose_samples=config.flow.propose_samples,
        solve_samples=config.flow.solve_samples,
        trained_attempts=config.solve.trained_attempts,
        tasks=config.flow.tasks,
        late=config.flow.late,
    )


def _channel(kind: type[T]) -> tuple[MemorySender[T], MemoryReceiver[T]]:
    return memory_channel(kind.__name__, CHANNEL_CAPACITY, deadline_seconds=None)


async def _propose(parts: Parts, admitted: Receiver[Admission], proposals: Sender[Proposal]) -> None:
    await propose(
        admitted,
        proposals,
        engine=parts.engine,
        dialogue=parts.dialogue,
        library=parts.library,
        config=parts.config.propose,
        seed=parts.config.run.seed,
    )


async def _validate(
    parts: Parts, proposed: Receiver[Proposal], challenges: Sender[Challenge], rejections: Sender[Rejected]
) -> None:
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


async def _solve(
    parts: Parts, challenged: Receiver[Challenge], attempts: Sender[Attempt], *, greedy: bool = False
) -> None:
    config = parts.config.solve
    if greedy:
        config = config.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    await solve(
        challenged,
        attempts,
        engine=parts.engine,
        dialogue=parts.dialogue,
        config=config,
        seed=parts.config.run.seed,
    )


async def _verify(parts: Parts, attempted: Receiver[Attempt], judgements: Sender[Judged]) -> None:
    await verify(
        attempted,
        judgements,
        sandbox=parts.sandbox,
        dialogue=parts.dialogue,
        float_tolerance=parts.config.reward.float_tolerance,
    )
