"""Self-play as a graph: the stages, their channels, one TaskGroup. It runs over any engine, sandbox and learner.

          ┌─────────────── tasks of the library ────────────┐
admit ────┴─► propose ─► validate ─────► solve ─► verify ─► advantage ─► supply ─► learner
                            └──── not a valid task ────────────┘
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from azr_async.errors import PeerVanished
from azr_async.messages import (
    Admission,
    Attempt,
    BatchRequest,
    Challenge,
    EvaluationRequest,
    EvaluationResult,
    Handover,
    Judged,
    Proposal,
    Rejected,
    SelfPlayState,
    StateRequest,
    WeightsReady,
)
from azr_async.ports import Receiver, Sender
from azr_async.programs.course import Course, FiledReplies, NotingEngine, Reply
from azr_async.programs.filing import Filing
from azr_async.programs.parts import Parts, channel, run_propose, run_solve, run_validate, run_verify
from azr_async.programs.rounds import evaluate, evaluate_proposer, seed
from azr_async.stages.advantage import advantage
from azr_async.stages.flow import Changed, admit, supply

Request = Handover | BatchRequest | EvaluationRequest | StateRequest | SelfPlayState | WeightsReady
Begin = Callable[[int, str, Handover | None], Awaitable[Parts]]


async def self_play(
    begin: Begin,
    requests: Receiver[Request],
    replies: Sender[Reply],
    *,
    stop: asyncio.Event,
    on_weights: Callable[[WeightsReady], None] = lambda ready: None,
) -> None:
    """Serve the learner until it closes `requests`; then everything else is cancelled and leaves nothing behind.

    The learner's first message is WeightsReady: from then on the engines hold the weights it trains. Before it come
    only a Handover, when another self-play was lost, and the state of self-play, when a run goes on from a checkpoint
    that has it. `begin` gives the parts of a loop that starts with weights of that version, in this state (the text is
    empty where there is none) and after this handover. `stop` ends admission; what is on its way is still delivered.
    `on_weights` hears of new weights before anything is admitted under them.
    """
    async with replies:
        first, state, handover = await anext(requests, None), "", None
        while isinstance(first, Handover | SelfPlayState):  # the newest counts
            if isinstance(first, Handover):
                handover, state = first, ""  # what holds after it comes with it
            else:
                state = first.state
            first = await anext(requests, None)
        if first is not None:  # else the learner ended before it began
            assert isinstance(first, WeightsReady)
            on_weights(first)
            parts = replace(await begin(first.version, state, handover), max_lag=first.max_lag)
            await _serve(parts, requests, replies, stop, on_weights)


async def _serve(
    parts: Parts,
    requests: Receiver[Request],
    replies: Sender[Reply],
    stop: asyncio.Event,
    on_weights: Callable[[WeightsReady], None],
) -> None:
    course, changed = Course(parts), Changed()
    replies = FiledReplies(replies, course, incarnation=parts.handover.incarnation if parts.handover else 0)
    batch_requests, wanted = channel(BatchRequest)

    async def work() -> None:
        if parts.standing is None:
            await seed(parts)
        course.begin()
        parts.report("playing", 0, 0)
        await _stages(parts, course, changed, wanted, replies, stop)

    async def wake_admission_to_stop() -> None:
        await stop.wait()
        changed.notify()

    async with batch_requests, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(work(), name="work"),
            group.create_task(wake_admission_to_stop(), name="stop"),
            group.create_task(_watch(replies), name="replies"),
        ]
        async for request in requests:
            match request:
                case BatchRequest():
                    await batch_requests.send(request)
                case WeightsReady():
                    on_weights(request)
                    course.installed(request.version, max_lag=request.max_lag)
                    changed.notify()
                case StateRequest():
                    await replies.send(await course.state(request.kept_step))
                case Handover():
                    raise PeerVanished("the learner has counted this process as lost. Look at logs/learner-0.log.")
                case EvaluationRequest():
                    tasks.append(group.create_task(_answer(parts, request, replies), name="evaluate"))
        for task in tasks:
            task.cancel()


async def _watch(replies: Sender[Reply]) -> None:
    """The learner waits for what is lost with the channel: this ends self-play, and the next one sends it again."""
    end = await replies.ended()
    if isinstance(end, PeerVanished):
        raise end


async def _answer(parts: Parts, request: EvaluationRequest, replies: Sender[Reply]) -> None:
    solved = await evaluate(parts)
    valid = await evaluate_proposer(parts)
    tasks = tuple(problem.task for problem in parts.suite)
    await replies.send(EvaluationResult(version=request.version, tasks=tasks, solved=solved, valid=valid))


async def _stages(
    parts: Parts,
    course: Course,
    changed: Changed,
    wanted: Receiver[BatchRequest],
    replies: Sender[Reply],
    stop: asyncio.Event,
) -> None:
    """The graph at the top of this file."""
    flow, filing = course.flow, _filing(parts, course, changed)
    parts = replace(parts, engine=NotingEngine(parts.engine, course.ledger))
    admissions, admitted = channel(Admission)
    proposals, proposed = channel(Proposal)
    challenges, challenged = channel(Challenge)
    rejections, rejected = channel(Rejected)
    attempts, attempted = channel(Attempt)
    judgements, judged = channel(Judged)
    async with asyncio.TaskGroup() as group:
        for name, stage in {
            "admit": admit(
                admissions,
                challenges.clone(),
                flow=flow,
                library=parts.library,
                changed=changed,
                stop=stop,
                on_admitted=filing.admitted,
            ),
            "propose": run_propose(parts, admitted, proposals),
            "validate": run_validate(parts, proposed, challenges, rejections),
            "solve": run_solve(parts, challenged, attempts),
            "verify": run_verify(parts, attempted, judgements),
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
                on_batch=filing.batch,
                on_dropped=filing.dropped,
                stats=filing.stats,
                notes=parts.notes,
            ),
        }.items():
            group.create_task(stage, name=name)


def _filing(parts: Parts, course: Course, changed: Changed) -> Filing:
    return Filing(
        course.flow,
        parts.library,
        course.ledger,
        tasks=parts.config.flow.tasks,
        usage=parts.usage,
        gauges=parts.gauges,
        widths=lambda: {
            "busy.inference": max(1.0, parts.gauges().get("engines.workers", 1.0)),
            "busy.sandbox": parts.config.sandbox.workers,
        },
        on_change=changed.notify,
    )
