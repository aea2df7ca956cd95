"""A loop that goes on from where another one stood, over the scripted engine and the real sandbox."""

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from azr_async.adapters.engine_client import ScriptedEngine
from azr_async.adapters.journal import SqliteJournal
from azr_async.config import Config, EvaluationConfig
from azr_async.errors import CheckpointError
from azr_async.messages import Completion, GenerateJob, RolloutBatch
from azr_async.programs.selfplay import known_standing
from tests.programs.test_graph import CONFIG, ScriptedLearner, running

CHANCE = random.Random(5)


class CapriciousEngine(ScriptedEngine):
    """Answers in another order each time."""

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        for _ in range(CHANCE.randrange(4)):
            await asyncio.sleep(0)
        async for completion in super().generate(job):
            yield completion


def config_with(max_lag: int) -> Config:
    return CONFIG.model_copy(
        update={
            "flow": CONFIG.flow.model_copy(update={"max_lag": max_lag}),
            "evaluation": EvaluationConfig(suite="none"),
        }
    )


async def batches(learner: ScriptedLearner, count: int) -> list[RolloutBatch]:
    made = []
    for _ in range(count):
        made.append(await learner.batch())
        await learner.trained()
    return made


def content(batch: RolloutBatch) -> list[tuple[object, ...]]:
    return [
        (rollout.group_id, rollout.role, rollout.task, rollout.reward, tuple(rollout.token_ids))
        for rollout in batch.rollouts
    ]


def journal_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


async def test_with_max_lag_0_the_same_batches_follow_whoever_is_quicker(tmp_path: Path) -> None:
    config = config_with(0)
    first, second = (journal_of(tmp_path, name) for name in ("first", "second"))
    async with running(first, config, suite=(), engine=CapriciousEngine) as (learner, _):
        await batches(learner, 2)
        state = await learner.state()
        expected = await batches(learner, 3)
    for file in first.glob("journal.sqlite*"):  # with what was found after the state was told
        shutil.copy(file, second)
    async with running(second, config, suite=(), engine=CapriciousEngine, version=2, state=state) as (learner, _):
        resumed = await batches(learner, 3)
    assert [content(batch) for batch in resumed] == [content(batch) for batch in expected]


async def test_what_was_under_way_is_started_anew_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    config = config_with(2)
    async with running(tmp_path, config, suite=()) as (learner, _):
        await batches(learner, 3)
        state = await learner.state()
        with SqliteJournal(tmp_path / "journal.sqlite") as reader:
            under_way = {sample for sample, entry in reader.samples().items() if entry.version < 3 and not entry.step}
        await batches(learner, 2)
    async with running(tmp_path, config, suite=(), version=3, state=state) as (learner, _):
        made = await batches(learner, 4)
    assert all(0 <= batch.version - rollout.oldest_version <= 2 for batch in made for rollout in batch.rollouts)
    with SqliteJournal(tmp_path / "journal.sqlite") as reader:
        samples = reader.samples()
    trained = Counter(entry.step for entry in samples.values() if entry.stage == "trained")
    assert trained == dict.fromkeys(range(1, 8), 3 * (3 + 16))
    assert under_way
    assert all(samples[sample].stage in ("trained", "dropped") for sample in under_way)


async def test_the_tasks_that_were_found_after_the_checkpoint_are_not_lost(tmp_path: Path) -> None:
    config = config_with(1)
    async with running(tmp_path, config, suite=()) as (learner, _):
        await batches(learner, 2)
        state = await learner.state()
        await batches(learner, 3)
    with SqliteJournal(tmp_path / "journal.sqlite") as reader:
        before = reader.problems()
    async with running(tmp_path, config, suite=(), version=2, state=state) as (learner, _):
        await batches(learner, 5)
    with SqliteJournal(tmp_path / "journal.sqlite") as reader:
        assert reader.problems()[: len(before)] == before


async def test_a_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, config_with(0), suite=()) as (learner, _):
        await batches(learner, 1)
        state = await learner.state()
    with pytest.raises(CheckpointError, match="of version 1, its weights are of version 2"):
        known_standing(CONFIG, state, version=2)


async def test_another_seed_draws_otherwise_from_there(tmp_path: Path) -> None:
    async with running(tmp_path, config_with(0), suite=()) as (learner, _):
        state = await learner.state()
    other = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"seed": 9})})
    seeds = [getattr(known_standing(config, state, version=0), "seed", None) for config in (CONFIG, other, other)]
    assert seeds[0] != seeds[1] == seeds[2]
