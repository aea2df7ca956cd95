"""The contract of a channel, the same in memory and over ZeroMQ."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel, zmq_receiver, zmq_sender
from azr_async.errors import ChannelClosed, ConfigError, PeerVanished
from azr_async.messages import BatchRequest
from azr_async.ports import Receiver, Sender

Ends = tuple[list[Sender[BatchRequest]], Receiver[BatchRequest]]
Link = Callable[..., Ends]
BLOCKED_SECONDS = 0.05


@pytest.fixture(params=["memory", "zeromq"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Link:
    """Makes a channel with a number of senders."""

    def in_memory(*, capacity: int = 4, senders: int = 1) -> Ends:
        ends: tuple[MemorySender[BatchRequest], MemoryReceiver[BatchRequest]]
        ends = memory_channel("requests", capacity, deadline_seconds=10.0)
        return [ends[0], *(ends[0].clone() for _ in range(1, senders))], ends[1]

    def over_zeromq(*, capacity: int = 4, senders: int = 1) -> Ends:
        endpoint = f"ipc://{tmp_path}/s"
        receiver = zmq_receiver(endpoint, (BatchRequest,), name="requests", capacity=capacity, expected_senders=senders)
        return [zmq_sender(endpoint, name=f"sender-{n}", peer="receiver") for n in range(senders)], receiver

    return in_memory if request.param == "memory" else over_zeromq


async def send_all(sender: Sender[BatchRequest], versions: range) -> None:
    async with sender:
        for version in versions:
            await sender.send(BatchRequest(version=version))


async def test_messages_arrive_in_order_and_closing_ends_the_iteration(link: Link) -> None:
    [sender], receiver = link(capacity=3)
    async with receiver, asyncio.TaskGroup() as tasks:
        tasks.create_task(send_all(sender, range(100)))
        assert [message.version async for message in receiver] == list(range(100))


async def test_the_end_stays_the_end(link: Link) -> None:
    [sender], receiver = link()
    async with receiver:
        await send_all(sender, range(1))
        assert [message.version async for message in receiver] == [0]
        assert [message async for message in receiver] == []


async def test_what_was_sent_before_closing_is_delivered_after_it(link: Link) -> None:
    [sender], receiver = link(capacity=4)
    async with receiver:
        await send_all(sender, range(4))
        assert [message.version async for message in receiver] == list(range(4))


@pytest.mark.parametrize("capacity", [1, 2, 5])
async def test_a_sender_waits_while_as_many_messages_as_fit_are_unread(link: Link, capacity: int) -> None:
    [sender], receiver = link(capacity=capacity)
    async with receiver, sender:
        for version in range(capacity):
            await sender.send(BatchRequest(version=version))
        for version in range(capacity, capacity + 3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(BLOCKED_SECONDS):
                    await sender.send(BatchRequest(version=-1))
            await anext(receiver)
            await sender.send(BatchRequest(version=version))
        assert [(await anext(receiver)).version for _ in range(capacity)] == list(range(3, capacity + 3))


async def test_a_channel_of_many_senders_ends_when_all_have_closed(link: Link) -> None:
    senders, receiver = link(senders=3)
    async with receiver, asyncio.TaskGroup() as tasks:
        for n, sender in enumerate(senders):
            tasks.create_task(send_all(sender, range(100 * n, 100 * n + 20)))
        arrived = [message.version async for message in receiver]
    assert sorted(arrived) == [100 * n + i for n in range(3) for i in range(20)]
    for n in range(3):
        own = [version for version in arrived if version // 100 == n]
        assert own == sorted(own)


async def test_a_channel_waits_for_senders_that_have_not_begun(link: Link) -> None:
    [early, late], receiver = link(senders=2)
    async with receiver:
        await send_all(early, range(1))
        await anext(receiver)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(BLOCKED_SECONDS):
                await anext(receiver)
        await send_all(late, range(7, 8))
        assert [message.version async for message in receiver] == [7]


async def test_each_message_goes_to_one_of_several_consumers(link: Link) -> None:
    [sender], receiver = link(capacity=2)
    taken: list[int] = []

    async def consume() -> None:
        async for message in receiver:
            taken.append(message.version)
            await asyncio.sleep(0)

    async with receiver, asyncio.TaskGroup() as tasks:
        tasks.create_task(send_all(sender, range(50)))
        for _ in range(3):
            tasks.create_task(consume())
    assert sorted(taken) == list(range(50))


async def test_a_cancelled_receive_loses_nothing(link: Link) -> None:
    [sender], receiver = link(capacity=2)
    arrived: list[int] = []

    async def receive() -> None:
        async for message in receiver:
            arrived.append(message.version)
            return

    async with receiver, asyncio.TaskGroup() as tasks:
        tasks.create_task(send_all(sender, range(200)))
        for turn in range(400):
            attempt = tasks.create_task(receive())
            for _ in range(turn % 7):
                await asyncio.sleep(0)
            attempt.cancel()
            await asyncio.wait([attempt])
        arrived += [message.version async for message in receiver]
    assert arrived == list(range(200))


async def test_a_cancelled_send_has_happened_whole_or_not_at_all(link: Link) -> None:
    [sender], receiver = link(capacity=2)
    sent: list[int] = []
    arrived: list[int] = []

    async def send(version: int) -> None:
        await sender.send(BatchRequest(version=version))
        sent.append(version)

    async def receive_all() -> None:
        arrived.extend([message.version async for message in receiver])

    async with receiver, asyncio.TaskGroup() as tasks, sender:
        for version in range(300):
            attempt = tasks.create_task(send(version))
            for _ in range(version % 7):
                await asyncio.sleep(0)
            attempt.cancel()
            await asyncio.wait([attempt])
            if version == 100:
                tasks.create_task(receive_all())
    assert arrived == sent
    assert len(sent) > 2


async def test_sending_to_a_receiver_that_has_left_says_so(link: Link) -> None:
    [sender], receiver = link(capacity=1)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(receiver)
        async with sender:
            await sender.send(BatchRequest(version=0))
            async with asyncio.TaskGroup() as tasks:
                blocked = tasks.create_task(refused_send(sender))
                await asyncio.sleep(0)
                await stack.aclose()
            assert "closed" in blocked.result()
            assert "closed" in await refused_send(sender)


async def test_who_waits_for_the_end_of_a_receiver_is_told_as_a_send_would_be(link: Link) -> None:
    [sender], receiver = link()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        await stack.enter_async_context(receiver)
        async with sender:
            waiting = tasks.create_task(sender.ended())
            await sender.send(BatchRequest(version=0))
            assert not waiting.done()
            await stack.aclose()
            assert str(await waiting) == await refused_send(sender)


async def refused_send(sender: Sender[BatchRequest]) -> str:
    with pytest.raises(ChannelClosed) as refusal:
        await sender.send(BatchRequest(version=1))
    return str(refusal.value)


async def test_a_closed_end_can_be_used_no_more(link: Link) -> None:
    [sender], receiver = link()
    async with receiver:
        await send_all(sender, range(1))
        await refused_send(sender)
    with pytest.raises(ChannelClosed):
        await anext(receiver)


async def test_an_error_in_the_body_passes_both_ends_as_it_is(link: Link) -> None:
    [sender], receiver = link()
    with pytest.raises(ZeroDivisionError):
        async with receiver, sender:
            _ = 1 // 0


async def test_cancelling_a_program_closes_both_ends(link: Link) -> None:
    [sender], receiver = link()

    async def program() -> None:
        async with receiver, sender:
            await anext(receiver)

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(program())
        await asyncio.wait([running], timeout=BLOCKED_SECONDS)
        running.cancel()
    assert running.cancelled()
    await refused_send(sender)


def test_a_channel_without_room_is_refused(link: Link) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        link(capacity=0)


def problems_channel() -> tuple[MemorySender[str], MemoryReceiver[str]]:
    return memory_channel("problems", 1, deadline_seconds=BLOCKED_SECONDS)


async def test_a_full_memory_channel_names_itself_when_nothing_is_taken() -> None:
    sender, receiver = problems_channel()
    async with receiver, sender:
        await sender.send("first")
        with pytest.raises(PeerVanished, match=r"channel problems has been full, .* 0\.05 s"):
            await sender.send("second")


async def test_an_empty_memory_channel_names_itself_when_nothing_is_sent() -> None:
    sender, receiver = problems_channel()
    async with receiver, sender:
        with pytest.raises(PeerVanished, match=r"channel problems has been empty, .* 1 open senders"):
            await anext(receiver)
        await sender.send("late")
        assert await anext(receiver) == "late"
