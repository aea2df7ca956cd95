"""How fast is each stage of the starter's pipeline when the others never make it wait?

The work is a run's own: the tasks of its library, as many proposals and attempts at them as a step has. The engine
answers them with all of its slots busy; the sandbox judges these very answers; the learner trains on them.
"""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
import uvloop

from azr_async.adapters.engines.embedded import EmbeddedEngine
from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.models import load_model
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.groups import rollout_of_rejection, rollouts_of_group
from azr_async.algorithm.jobs import generation_job
from azr_async.algorithm.library import Library
from azr_async.config import Config
from azr_async.messages import (
    TASKS,
    Admission,
    Attempt,
    Challenge,
    Completion,
    Judged,
    Malformed,
    Problem,
    Proposal,
    Rejected,
    Rollout,
    RolloutBatch,
)
from azr_async.programs.parts import channel
from azr_async.stages.validate import validate
from azr_async.stages.verify import verify

STEPS: Final = 6
"""So many steps' work goes through each stage; the first one warms the learner up."""


@dataclass
class _Work:
    """What a step needs, and what became of it."""

    challenges: list[Challenge]
    proposals: list[tuple[Admission, tuple[Problem, ...]]]
    attempts: list[Attempt]
    proposed: list[Proposal]
    judged: list[Judged]
    valid: set[int]
    """Groups whose proposal is."""


def stages_alone(journal: Path, config_json: str) -> dict[str, float]:
    """Tokens of completions per second of wall time: inference, sandbox, learner. For a process of its own."""
    config = Config.model_validate_json(config_json)
    torch.set_num_threads(1)
    works = [_work_of_step(journal, config, step) for step in range(STEPS)]
    rates = {"inference": _inference(works, config), "sandbox": uvloop.run(_sandbox(works, config))}
    return rates | {"learner": _learner(works, config)}


def _work_of_step(journal: Path, config: Config, step: int) -> _Work:
    with SqliteJournal(journal) as tasks:
        problems = tasks.problems()
    groups = config.flow.solve_samples // config.solve.attempts
    numbers = itertools.count(10_000 * step)
    work = _Work([], [], [], [], [], set())
    for task in TASKS:
        library = Library(capacity=len(problems), seed=step)
        for problem in problems:
            library.add(problem)
        for number in itertools.islice(numbers, groups):
            attempts = config.solve.attempts
            work.challenges.append(
                Challenge(
                    group_id=number,
                    problem=library.task(task, draw=number),
                    proposal=None,
                    attempts=attempts,
                    trained_attempts=attempts,
                )
            )
        for number in itertools.islice(numbers, config.flow.propose_samples):
            admission = Admission(group_id=number, task=task, is_proposal=True, trained_attempts=0, version=0)
            work.proposals.append((admission, library.references(task, config.propose.references, draw=number)))
    return work


# ---------------------------------------------------------------- inference


def _inference(works: Sequence[_Work], config: Config) -> float:
    """All of it at once; the clock stops when there is less left than slots."""
    model, tokenizer = load_model(config.model.path, config.model.precision, torch.device("cpu"))
    slots = config.engine.slots
    engine = EmbeddedEngine(
        model, tokenizer, slots=slots, context_tokens=config.engine.context_tokens, on_new_weights="keep"
    )
    left = _submit(engine, works, config)
    done: list[Completion] = []
    began, seconds, tokens = time.perf_counter(), 1.0, 0
    while engine.has_work:
        done += engine.step()
        if left - len(done) >= slots:
            seconds, tokens = time.perf_counter() - began, engine.generated_tokens
    _hand_out(done, works, config)
    return tokens / seconds


def _submit(engine: EmbeddedEngine, works: Sequence[_Work], config: Config) -> int:
    """Every job of every step; how many samples that are."""
    dialogue, samples = make_dialogue(config.model.dialogue), 0
    for work in works:
        solve, propose = config.solve, config.propose
        jobs = [
            generation_job(
                "solve", one.group_id, dialogue.solve(one.problem), samples=one.attempts, seed=1,
                temperature=solve.temperature, top_p=solve.top_p, max_tokens=solve.max_tokens,
            )
            for one in work.challenges
        ]  # fmt: skip
        for admission, references in work.proposals:
            prompt = dialogue.propose(admission.task, references, pairs=propose.induction_pairs)
            jobs.append(generation_job(
                "propose", admission.group_id, prompt, samples=1, seed=1,
                temperature=propose.temperature, top_p=propose.top_p, max_tokens=propose.max_tokens,
            ))  # fmt: skip
        for job in jobs:
            engine.submit(job)
            samples += job.samples
    return samples


def _hand_out(done: Sequence[Completion], works: Sequence[_Work], config: Config) -> None:
    """Completions -> attempts and proposals of the step that asked for them."""
    dialogue = make_dialogue(config.model.dialogue)
    by_job: defaultdict[int, list[Completion]] = defaultdict(list)
    for completion in done:
        by_job[completion.job_id].append(completion)
    for work in works:
        for challenge in work.challenges:
            work.attempts += [
                Attempt(challenge=challenge, completion=one) for one in by_job[2 * challenge.group_id + 1]
            ]
        for admission, references in work.proposals:
            (completion,) = by_job[2 * admission.group_id]
            draft = (
                dialogue.read_proposal(
                    admission.task, completion.text, references, pairs=config.propose.induction_pairs
                )
                if completion.finish == "stop"
                else Malformed(reason="no end")
            )
            work.proposed.append(
                Proposal(admission=admission, references=references, completion=completion, draft=draft)
            )


# ---------------------------------------------------------------- sandbox


async def _sandbox(works: Sequence[_Work], config: Config) -> float:
    """The validate and verify stages of a run, side by side, over its sandbox."""
    settings = config.sandbox
    async with SandboxPool(
        workers=settings.workers,
        wall_seconds=settings.wall_seconds,
        cpu_seconds=settings.cpu_seconds,
        memory_mb=settings.memory_mb,
        allowed_imports=settings.allowed_imports,
        label="benchmark",
        require=settings.require,
    ) as sandbox:
        began = time.perf_counter()
        for work in works:
            await _judge(work, sandbox, config)
        seconds = time.perf_counter() - began
    return sum(len(one.token_ids) for work in works for one in _completions(work)) / seconds


async def _judge(work: _Work, sandbox: SandboxPool, config: Config) -> None:
    dialogue = make_dialogue(config.model.dialogue)
    proposals, proposed = channel(Proposal)
    challenges, valid = channel(Challenge)
    rejections, rejected = channel(Rejected)
    attempts, attempted = channel(Attempt)
    judgements, judged = channel(Judged)

    async def feed() -> None:
        async with attempts, proposals:
            for proposal in work.proposed:
                await proposals.send(proposal)
            for attempt in work.attempts:
                await attempts.send(attempt)

    async def count_valid() -> None:
        async for challenge in valid:
            work.valid.add(challenge.group_id)

    async def pass_over() -> None:
        async for _ in rejected:
            pass

    with SqliteJournal(Path(":memory:")) as journal:
        async with asyncio.TaskGroup() as group:
            for task in (feed(), count_valid(), pass_over()):
                group.create_task(task)
            group.create_task(
                validate(
                    proposed, challenges, rejections, sandbox=sandbox, library=Library(capacity=10_000, seed=1),
                    journal=journal, config=config.propose, attempts=config.solve.attempts, held_out_programs=(),
                )
            )  # fmt: skip
            group.create_task(verify(attempted, judgements, sandbox=sandbox, dialogue=dialogue, float_tolerance=0.0))
            async for item in judged:
                work.judged.append(item)


# ---------------------------------------------------------------- learner


def _learner(works: Sequence[_Work], config: Config) -> float:
    """Canned batches, one after the other; the first does not count."""
    model, _ = load_model(config.model.path, "float32", torch.device("cpu"))
    trainer = Trainer(model, config, connect_ranks(config))
    batches = [_batch(work, version) for version, work in enumerate(works)]
    trainer.train(batches[0])
    began = time.perf_counter()
    trained = sum(trainer.train(batch).trained_tokens for batch in batches[1:])
    return trained / (time.perf_counter() - began)


def _batch(work: _Work, version: int) -> RolloutBatch:
    numbers = itertools.count()
    by_group: defaultdict[int, list[Judged]] = defaultdict(list)
    for item in work.judged:
        by_group[item.attempt.challenge.group_id].append(item)
    rollouts: list[Rollout] = []
    for items in by_group.values():
        challenge = items[0].attempt.challenge
        rollouts += rollouts_of_group(challenge, items, proposer_extreme=0.0, rollout_ids=numbers)
    for proposal in work.proposed:
        sample = rollout_of_rejection(Rejected(proposal=proposal, reason=""), rollout_ids=numbers)
        is_valid = proposal.admission.group_id in work.valid
        rollouts.append(replace(sample, reward=0.5) if is_valid else sample)
    newest = [
        replace(rollout, token_version=np.where(rollout.token_version < 0, -1, version).astype(np.int32))
        for rollout in rollouts
    ]
    return RolloutBatch(version=version, rollouts=tuple(newest))


def _completions(work: _Work) -> list[Completion]:
    return [attempt.completion for attempt in work.attempts] + [proposal.completion for proposal in work.proposed]
