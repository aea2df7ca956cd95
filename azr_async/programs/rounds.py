"""What self-play does outside the flow: seed the library before the first step, and judge the held-out suite."""

import asyncio
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from azr_async.adapters.journal import SqliteJournal
from azr_async.algorithm.judging import RIGHT
from azr_async.algorithm.library import Library
from azr_async.messages import Admission, Attempt, Challenge, Judged, Proposal, Rejected, Task
from azr_async.programs.parts import Parts, channel, run_propose, run_solve, run_validate, run_verify
from azr_async.stages.grow import grow


async def seed(parts: Parts) -> None:
    """Let the untrained policy fill the library; induction comes last, since it needs programs of the others."""
    config, library = parts.config, parts.library
    for kinds in (("deduction", "abduction"), ("induction",)):
        tasks: list[Task] = [task for task in config.flow.tasks if task in kinds]
        admissions, admitted = channel(Admission)
        proposals, proposed = channel(Proposal)
        challenges, valid = channel(Challenge)
        rejections, invalid = channel(Rejected)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_propose(parts, admitted, proposals), name="seed-propose")
            group.create_task(run_validate(parts, proposed, challenges, rejections), name="seed-validate")
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
                version=parts.start_version,
                on_progress=partial(parts.report, f"seeding {' and '.join(tasks)}"),
            )


async def evaluate_proposer(parts: Parts) -> dict[str, float]:
    """Share of valid proposals per task kind, with held-out problems as references; nothing of it is kept."""
    config = parts.config
    if not parts.suite or not config.evaluation.proposals:
        return {}
    library = Library(capacity=len(parts.suite), seed=config.run.seed)
    for problem in parts.suite:
        library.add(problem)
    valid: Counter[Task] = Counter()
    admissions, admitted = channel(Admission)
    proposals, proposed = channel(Proposal)
    challenges, accepted = channel(Challenge)
    rejections, rejected = channel(Rejected)

    async def ask() -> None:
        async with admissions:
            for task in config.flow.tasks * config.evaluation.proposals:
                group_id = next(parts.group_ids)
                await admissions.send(
                    Admission(group_id=group_id, task=task, is_proposal=True, trained_attempts=0, version=0)
                )

    async def count_valid() -> None:
        async for challenge in accepted:
            valid[challenge.problem.task] += 1

    with SqliteJournal(Path(":memory:")) as forgotten:
        scratch = replace(parts, library=library, journal=forgotten, suite=())
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(), name="evaluate-admit")
            group.create_task(run_propose(scratch, admitted, proposals), name="evaluate-propose")
            group.create_task(run_validate(scratch, proposed, challenges, rejections), name="evaluate-validate")
            group.create_task(count_valid(), name="evaluate-valid")
            async for _ in rejected:
                pass
    return {task: valid[task] / config.evaluation.proposals for task in config.flow.tasks}


async def evaluate(parts: Parts) -> tuple[bool, ...]:
    """Which of the held-out problems the current weights solve greedily, in the suite's order."""
    order = {next(parts.group_ids): index for index, _ in enumerate(parts.suite)}
    solved = [False] * len(parts.suite)
    challenges, challenged = channel(Challenge)
    attempts, attempted = channel(Attempt)
    judgements, judged = channel(Judged)

    async def ask() -> None:
        async with challenges:
            for group_id, index in order.items():
                problem = parts.suite[index]
                await challenges.send(
                    Challenge(group_id=group_id, problem=problem, proposal=None, attempts=1, trained_attempts=0)
                )

    async with asyncio.TaskGroup() as group:
        group.create_task(ask(), name="evaluate-ask")
        group.create_task(run_solve(parts, challenged, attempts, greedy=True), name="evaluate-solve")
        group.create_task(run_verify(parts, attempted, judgements), name="evaluate-verify")
        async for item in judged:
            solved[order[item.attempt.challenge.group_id]] = item.reward == RIGHT
    return tuple(solved)
