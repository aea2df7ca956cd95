"""The proxy between two real ZeroMQ sockets does what it is told, to one message, and nothing else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis.strategies import binary, integers, lists

from azr_async.adapters.channels import zmq_receiver, zmq_sender
from azr_async.faults.proxy import Action, Proxy, Tampering
from azr_async.faults.zmtp import MORE, Frame, read_message, with_bit_turned
from azr_async.messages import CancelJob, Message

LONG = bytes(range(256)) * 300
"""Needs a length of 8 bytes."""


class Ends:
    """A DEALER that connects to the proxy, and a ROUTER behind it."""

    def __init__(self, dealer: zmq.asyncio.Socket, router: zmq.asyncio.Socket, proxy: Proxy) -> None:
        self.dealer, self.router, self.proxy = dealer, router, proxy

    async def say(self, *bodies: bytes) -> None:
        for body in bodies:
            await self.dealer.send_multipart([b"DATA", body])

    async def heard(self, count: int) -> list[bytes]:
        return [(await self.router.recv_multipart())[-1] for _ in range(count)]


@asynccontextmanager
async def ends(folder: Path) -> AsyncIterator[Ends]:
    context = zmq.asyncio.Context()
    try:
        async with Proxy(folder / "front", folder / "real").open() as proxy:
            dealer, router = context.socket(zmq.DEALER), context.socket(zmq.ROUTER)
            dealer.connect(f"ipc://{folder}/front")  # before anybody listens behind it
            router.bind(f"ipc://{folder}/real")
            yield Ends(dealer, router, proxy)
            dealer.close(0)
            router.close(0)
    finally:
        context.term()


async def test_messages_of_any_size_pass_unchanged_in_both_directions(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.say(b"", b"x", LONG)
        identity, *first = await both.router.recv_multipart()
        assert first == [b"DATA", b""]
        assert await both.heard(2) == [b"x", LONG]
        await both.router.send_multipart([identity, b"ALLOW", LONG])
        assert await both.dealer.recv_multipart() == [b"ALLOW", LONG]
        assert both.proxy.messages == 4


@pytest.mark.parametrize(
    ("action", "arrives"),
    [
        ("drop", [b"0", b"1", b"3"]),
        ("duplicate", [b"0", b"1", b"2", b"2", b"3"]),
        ("delay", [b"0", b"1", b"2", b"3"]),
    ],
)
async def test_the_meant_message_is_dropped_doubled_or_late(
    tmp_path: Path, action: Action, arrives: list[bytes]
) -> None:
    async with ends(tmp_path) as both:
        tampering = Tampering(action, passed=2, seconds=0.05)
        both.proxy.arm(tampering)
        await both.say(b"0", b"1", b"2", b"3")
        assert await both.heard(len(arrives)) == arrives
        assert await tampering.hit == "DATA, 5 bytes"
        await both.say(b"after")
        assert await both.heard(1) == [b"after"]


async def test_a_corrupted_message_differs_in_one_bit(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        both.proxy.arm(Tampering("corrupt", bit=8 * 4 + 8 * 1000 + 3))  # "DATA" are the first four bytes
        await both.say(LONG)
        (heard,) = await both.heard(1)
        differences = [
            (index, one ^ other) for index, (one, other) in enumerate(zip(heard, LONG, strict=True)) if one != other
        ]
        assert differences == [(1000, 8)]


async def test_only_the_meant_part_is_touched(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        tampering = Tampering("drop", part="answer")
        both.proxy.arm(tampering)
        await both.say(b"1")
        identity, *_ = await both.router.recv_multipart()
        await both.router.send_multipart([identity, b"ALLOW"])
        await both.router.send_multipart([identity, b"GOODBYE"])
        assert await both.dealer.recv_multipart() == [b"GOODBYE"]
        assert await tampering.hit == "ALLOW, 5 bytes"


async def test_when_one_end_goes_the_other_ones_connection_breaks(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.say(b"1")
        await both.heard(1)
        news = both.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        both.router.close(0)
        await asyncio.wait_for(news.recv_multipart(), 10.0)
        both.dealer.disable_monitor()
        news.close(0)


async def test_a_channel_of_the_product_works_through_it(tmp_path: Path) -> None:
    async with Proxy(tmp_path / "front", tmp_path / "real").open():
        receiver = zmq_receiver(f"ipc://{tmp_path}/real", (CancelJob,), name="orders", capacity=4)
        async with receiver:
            async with zmq_sender(f"ipc://{tmp_path}/front", name="one", peer="other") as sender:
                await sender.send(CancelJob(job_id=7))
                assert await anext(receiver) == CancelJob(job_id=7)
            assert [message async for message in receiver] == list[Message]()


@given(bodies=lists(binary(max_size=300), min_size=1, max_size=4), bit=integers(0, 2**31))
def test_turning_a_bit_twice_changes_nothing_and_once_exactly_one(bodies: list[bytes], bit: int) -> None:
    frames = [Frame(0, body) for body in bodies]
    turned = with_bit_turned(frames, bit)
    assert with_bit_turned(turned, bit) == frames
    whole, other = b"".join(bodies), b"".join(frame.body for frame in turned)
    assert sum((one ^ two).bit_count() for one, two in zip(whole, other, strict=True)) == bool(whole)


@given(bodies=lists(binary(max_size=600), min_size=1, max_size=4))
def test_frames_read_back_as_they_were_written(bodies: list[bytes]) -> None:
    frames = [Frame(MORE, body) for body in bodies[:-1]] + [Frame(0, bodies[-1])]

    async def read_back() -> list[Frame]:
        stream = asyncio.StreamReader()
        stream.feed_data(b"".join(frame.to_bytes() for frame in frames))
        return await read_message(stream)

    assert [frame.body for frame in asyncio.run(read_back())] == bodies
