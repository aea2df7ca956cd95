"""What the learner tells self-play, and the next one after that was lost."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.adapters.channels import memory_channel
from azr_async.errors import PeerVanished
from azr_async.messages import (
    BatchRequest,
    EvaluationRequest,
    EvaluationResult,
    Handover,
    RolloutBatch,
    SelfPlayState,
    StateRequest,
    WeightsReady,
)
from azr_async.programs.learner_link import Conversation, Link, ToSelfPlay


def begun() -> Conversation:
    talk = Conversation()
    talk.said(SelfPlayState(version=3, state="{}"))
    talk.said(WeightsReady(version=3, workers={"inference-0": 7}))
    talk.said(BatchRequest(version=3))
    return talk


def test_the_next_one_hears_where_the_run_goes_on_while_nothing_has_come() -> None:
    assert begun().begin_anew() == [
        Handover(incarnation=1, has_begun=False),
        SelfPlayState(version=3, state="{}"),
        WeightsReady(version=3, workers={"inference-0": 7}),
        BatchRequest(version=3),
    ]


def test_the_next_one_hears_which_batches_are_held_and_what_is_open() -> None:
    talk = begun()
    assert talk.takes(RolloutBatch(version=3, rollouts=()))
    for message in (BatchRequest(version=4), EvaluationRequest(version=3), StateRequest(version=3)):
        talk.said(message)
    assert talk.takes(RolloutBatch(version=4, rollouts=()))
    handover, weights, *still_open = talk.begin_anew()
    assert handover == Handover(incarnation=1, has_begun=True, held=(3, 4))
    assert isinstance(weights, WeightsReady)
    assert still_open == [EvaluationRequest(version=3), StateRequest(version=3)]
    talk.said(WeightsReady(version=4))
    assert talk.begin_anew()[0] == Handover(incarnation=2, has_begun=True, held=(4,))


def test_what_is_late_or_comes_twice_does_not_count() -> None:
    talk = begun()
    talk.begin_anew()
    assert not talk.takes(RolloutBatch(version=3, rollouts=()))
    assert talk.takes(RolloutBatch(version=3, rollouts=(), incarnation=1))
    assert not talk.takes(RolloutBatch(version=3, rollouts=(), incarnation=1))
    assert not talk.takes(EvaluationResult(version=3, tasks=(), solved=(), incarnation=1))


@given(st.lists(st.sampled_from(["arrives", "late", "lost", "trained"]), max_size=60))
def test_each_batch_is_taken_once_whoever_is_lost_in_between(moves: list[str]) -> None:
    talk, version, taken = Conversation(), 0, list[int]()
    talk.said(WeightsReady(version=0))
    talk.said(BatchRequest(version=0))
    for move in moves:
        if move == "lost":
            (handover, *_) = talk.begin_anew()
            assert isinstance(handover, Handover)
            assert handover.held == tuple(held for held in taken if held >= version)
        elif move == "trained" and version in taken:
            version += 1
            talk.said(WeightsReady(version=version))
        for ahead in (0, 1):
            incarnation = talk.incarnation - (move == "late")
            if talk.takes(RolloutBatch(version=version + ahead, rollouts=(), incarnation=incarnation)):
                taken.append(version + ahead)
                talk.said(BatchRequest(version=version + ahead + 1))
    assert taken == list(range(len(taken)))


async def test_what_was_said_to_one_that_is_lost_is_said_to_the_next() -> None:
    ends = [memory_channel("requests", 8, deadline_seconds=5.0) for _ in range(2)]
    senders = iter([sender for sender, _ in ends])
    news: list[str] = []
    link: Link = Link(lambda: next(senders), on_lost=lambda: news.append("lost"), on_found=lambda: news.append("found"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(link.run())
        first: list[ToSelfPlay] = []
        async with ends[0][1] as receiver:
            await link.send(WeightsReady(version=0))
            await link.send(BatchRequest(version=0))
            first += [await anext(receiver), await anext(receiver)]
        async with ends[1][1] as receiver:
            second = [await anext(receiver) for _ in range(3)]
            link.close()
            assert await anext(receiver, None) is None
        await running
    assert first == second[1:]
    assert second[0] == Handover(incarnation=1, has_begun=False)
    assert news == ["lost", "found"]


async def test_nobody_waits_for_the_next_one_when_the_run_is_to_stop() -> None:
    sender, receiver = memory_channel("requests", 8, deadline_seconds=5.0)

    class Nobody(type(sender)):  # type: ignore[misc]
        async def __aenter__(self) -> None:
            await asyncio.Event().wait()

    ways = iter([sender, Nobody(sender._buffer)])
    link: Link = Link(lambda: next(ways), on_lost=lambda: link.hurry(), on_found=lambda: None)
    async with receiver:
        pass
    with pytest.raises(PeerVanished, match="the run was stopped before another one came"):
        await link.run()
