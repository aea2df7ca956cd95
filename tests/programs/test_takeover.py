"""Self-play is lost and started again under a learner that goes on: nothing is trained twice, no task is lost."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from azr_async.adapters.journal import SqliteJournal
from azr_async.messages import Handover, RolloutBatch
from tests.programs.test_course import batches, config_with
from tests.programs.test_graph import running

SAMPLES = 3 * (3 + 16)


async def play_and_lose(
    folder: Path, max_lag: int, trained: int, more: int, handover: Handover | None = None, version: int = 0
) -> list[RolloutBatch]:
    """Train some batches, take some more that stay untrained, then end as suddenly as one process can."""
    held = []
    async with AsyncExitStack() as stack:
        loop = running(folder, config_with(max_lag), suite=(), version=version, handover=handover)
        learner, _ = await stack.enter_async_context(loop)
        await batches(learner, trained)
        installed = learner.version
        for ahead in range(more):
            learner.version = installed + ahead
            held.append(await learner.batch())
    return held


def samples(folder: Path) -> dict[tuple[str, int | None], int]:
    with SqliteJournal(folder / "journal.sqlite") as reader:
        return Counter((entry.stage, entry.step) for entry in reader.samples().values())


@pytest.mark.parametrize(("max_lag", "more"), [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)])
async def test_the_next_one_goes_on_after_the_batches_that_the_learner_holds(
    tmp_path: Path, max_lag: int, more: int
) -> None:
    held = await play_and_lose(tmp_path, max_lag, 3, more)
    with SqliteJournal(tmp_path / "journal.sqlite") as reader:
        before = reader.problems()
    handover = Handover(incarnation=1, has_begun=True, held=tuple(batch.version for batch in held))
    async with running(tmp_path, config_with(max_lag), suite=(), version=3, handover=handover) as (learner, _):
        for _ in held:
            await learner.trained()
        made = await batches(learner, 3)
    assert {batch.incarnation for batch in made} == {1}
    assert [batch.version for batch in made] == [3 + more, 4 + more, 5 + more]
    assert all(0 <= batch.version - one.oldest_version <= max_lag for batch in made for one in batch.rollouts)
    trained = {step: count for (stage, step), count in samples(tmp_path).items() if stage == "trained"}
    assert trained == dict.fromkeys(range(1, 7 + more), SAMPLES)
    with SqliteJournal(tmp_path / "journal.sqlite") as reader:
        assert reader.problems()[: len(before)] == before


async def test_a_batch_that_never_reached_the_learner_is_made_again_of_its_samples(tmp_path: Path) -> None:
    lost = (await play_and_lose(tmp_path, 1, 2, 1))[0]
    assert samples(tmp_path)["admitted", 3] == SAMPLES  # in the journal before it was sent
    handover = Handover(incarnation=1, has_begun=True)
    async with running(tmp_path, config_with(1), suite=(), version=2, handover=handover) as (learner, _):
        await batches(learner, 2)
    assert samples(tmp_path)["trained", 3] == SAMPLES
    with SqliteJournal(tmp_path / "journal.sqlite") as reader:
        ends = {sample: entry.stage for sample, entry in reader.samples().items()}
    groups = {rollout.group_id for rollout in lost.rollouts}
    assert all(stage != "admitted" for sample, stage in ends.items() if sample.group_id in groups)


async def test_one_of_which_nothing_came_is_followed_by_one_that_begins_as_it_did(tmp_path: Path) -> None:
    await play_and_lose(tmp_path, 1, 0, 0)
    handover = Handover(incarnation=1, has_begun=False)
    async with running(tmp_path, config_with(1), suite=(), handover=handover) as (learner, _):
        made = await batches(learner, 2)
    assert [(batch.version, batch.incarnation) for batch in made] == [(0, 1), (1, 1)]


async def test_one_after_the_other_may_be_lost(tmp_path: Path) -> None:
    version = 0
    for incarnation in range(4):
        handover = Handover(incarnation=incarnation, has_begun=True, held=(version,)) if incarnation else None
        learner_version = version
        async with running(tmp_path, config_with(1), suite=(), version=learner_version, handover=handover) as (
            learner,
            _,
        ):
            if handover is not None:
                await learner.trained()
            await batches(learner, 1)
            assert (await learner.batch()).version == learner.version
            version = learner.version
    trained = {step: count for (stage, step), count in samples(tmp_path).items() if stage == "trained"}
    assert trained == dict.fromkeys(range(1, version + 1), SAMPLES)


async def test_a_self_play_that_the_learner_has_counted_as_lost_ends(tmp_path: Path) -> None:
    async def count_as_lost() -> None:
        async with running(tmp_path, config_with(1), suite=()) as (learner, _):
            await learner.requests.send(Handover(incarnation=1, has_begun=True))
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup, match="unhandled"):
        await count_as_lost()
