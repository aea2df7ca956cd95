"""What only a channel between processes can meet: strangers, silence, death, and addresses that cannot be had."""

import asyncio
import signal
import socket as sockets
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from azr_async.adapters.channels import (
    ZmqContext,
    ZmqReceiver,
    ZmqSender,
    protocol,
    shared_context,
    wire,
    zmq_receiver,
    zmq_sender,
)
from azr_async.adapters.channels.endpoints import LONGEST_IPC_PATH_BYTES
from azr_async.errors import ChannelClosed, ConfigError, MessageError, PeerVanished
from azr_async.messages import BatchRequest, Progress, WeightsReady

BEAT_SECONDS = 0.02
TIMEOUT_SECONDS = 0.2


def receiver_at(
    endpoint: str,
    *,
    capacity: int = 4,
    senders: int = 1,
    join_seconds: float | None = None,
    timeout_seconds: float = 10.0,
    limit_bytes: int = 1000,
) -> ZmqReceiver[BatchRequest]:
    return zmq_receiver(
        endpoint,
        (BatchRequest,),
        name="requests",
        capacity=capacity,
        expected_senders=senders,
        join_seconds=join_seconds,
        heartbeat_seconds=BEAT_SECONDS,
        peer_timeout_seconds=timeout_seconds,
        limit_bytes=limit_bytes,
    )


def sender_to(
    endpoint: str,
    name: str = "learner",
    *,
    beat_seconds: float = BEAT_SECONDS,
    timeout_seconds: float = 10.0,
    connect_seconds: float = 10.0,
    context: ZmqContext | None = None,
) -> ZmqSender[BatchRequest]:
    return zmq_sender(
        endpoint,
        name=name,
        peer="selfplay",
        heartbeat_seconds=beat_seconds,
        peer_timeout_seconds=timeout_seconds,
        connect_seconds=connect_seconds,
        context=context,
    )


@asynccontextmanager
async def raw_socket(kind: int, endpoint: str) -> AsyncIterator[zmq.asyncio.Socket]:
    """A peer that says what it likes."""
    with zmq.asyncio.Context() as context, context.socket(kind) as socket:
        socket.set(zmq.LINGER, 0)
        if kind == zmq.ROUTER:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
        yield socket


def said(*frames: bytes) -> tuple[bytes, ...]:
    return protocol.sealed(*frames)


def data(number: int, payload: bytes) -> tuple[bytes, ...]:
    return said(protocol.DATA, protocol.number_frame(number), payload)


def welcome(messages: int, limit_bytes: int = 100) -> tuple[bytes, ...]:
    return said(protocol.WELCOME, protocol.number_frame(messages), protocol.number_frame(limit_bytes))


# ---------------------------------------------------------------- strangers and malformed frames


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x80", wire.encode(WeightsReady(version=1)), b"\x81\xa4Nope\x80", b"x" * 1001]
)
async def test_a_bad_payload_is_counted_and_costs_its_sender_no_credit(tmp_path: Path, payload: bytes) -> None:
    async with receiver_at(f"ipc://{tmp_path}/s", limit_bytes=1000) as receiver:
        async with raw_socket(zmq.DEALER, receiver.endpoint) as stranger:
            await stranger.send_multipart(said(protocol.HELLO, b"stranger"))
            for number in (1, 2, 3):
                await stranger.send_multipart(data(number, payload))
            await stranger.send_multipart(data(4, wire.encode(BatchRequest(version=7))))
            await stranger.send_multipart(said(protocol.CLOSE, protocol.number_frame(4)))
            assert tuple(await stranger.recv_multipart()) == welcome(4, 1000)
            assert [message.version async for message in receiver] == [7]
        assert receiver.refused == 3


async def test_good_messages_between_bad_ones_arrive(tmp_path: Path) -> None:
    async with receiver_at(f"ipc://{tmp_path}/s") as receiver:
        async with raw_socket(zmq.DEALER, receiver.endpoint) as stranger:
            await stranger.send_multipart(said(protocol.HELLO, b"stranger"))
            for version in range(10):
                await stranger.send_multipart(data(2 * version + 1, b"\xc1"))
                await stranger.send_multipart(data(2 * version + 2, wire.encode(BatchRequest(version=version))))
                assert (await anext(receiver)).version == version
        assert receiver.refused == 10


async def test_a_frame_far_over_the_limit_ends_its_connection_and_disturbs_nobody(tmp_path: Path) -> None:
    async with receiver_at(f"ipc://{tmp_path}/s", timeout_seconds=TIMEOUT_SECONDS) as receiver:
        async with raw_socket(zmq.DEALER, receiver.endpoint) as stranger, sender_to(receiver.endpoint) as sender:
            await stranger.send_multipart(said(protocol.HELLO, b"stranger"))
            assert (await stranger.recv_multipart())[0] == protocol.WELCOME
            await stranger.send_multipart(data(1, bytes(10_000_000)))
            with pytest.raises(PeerVanished, match="stranger"):
                await anext(receiver)
            await sender.send(BatchRequest(version=1))
            assert (await anext(receiver)).version == 1
        assert receiver.refused == 0  # it never got as far


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"HELLO", b"not sealed"),
        said(b"HELLO"),
        said(b"HELLO", b""),
        said(b"HELLO", b"\xff\n"),
        said(b"HELLO", b"n" * 101),
        data(1, wire.encode(BatchRequest(version=1))),
        said(b"a", b"b", b"c", b"d"),
    ],
)
async def test_a_stranger_is_refused_and_disturbs_nobody(tmp_path: Path, frames: tuple[bytes, ...]) -> None:
    async with receiver_at(f"ipc://{tmp_path}/s") as receiver:
        async with raw_socket(zmq.DEALER, receiver.endpoint) as stranger, sender_to(receiver.endpoint) as sender:
            await stranger.send_multipart(frames)
            assert tuple(await stranger.recv_multipart()) == said(protocol.UNKNOWN)
            await sender.send(BatchRequest(version=1))
            assert (await anext(receiver)).version == 1
            assert receiver.senders == ("learner",)
        assert receiver.refused == 1


async def test_frames_that_make_no_sense_do_not_disturb_a_sender(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with raw_socket(zmq.ROUTER, endpoint) as odd, asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(send_one(endpoint))
        identity, *_ = await odd.recv_multipart()
        for frames in ([b""], [b"WELCOME"], [b"WELCOME", b"1", b"2"], [b"ALLOW", b"x"], [b"UNKNOWN"], [b"a", b"b"]):
            await odd.send_multipart([identity, *frames])
            await odd.send_multipart([identity, *said(*frames)])
        await odd.send_multipart([identity, *welcome(1)])
        assert await odd.recv_multipart() == [identity, *data(1, wire.encode(BatchRequest(version=1)))]
        assert await odd.recv_multipart() == [identity, *said(protocol.CLOSE, protocol.number_frame(1))]
        await odd.send_multipart([identity, *said(protocol.GOODBYE)])
        await odd.send_multipart([identity, *said(protocol.UNKNOWN)])  # the answer to a heartbeat after that
        await sending


async def send_one(endpoint: str) -> None:
    async with sender_to(endpoint) as sender:
        await sender.send(BatchRequest(version=1))


async def test_a_message_over_the_receivers_limit_is_refused_by_its_sender(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    receiver = zmq_receiver(endpoint, (Progress,), name="progress", capacity=1, limit_bytes=100)
    sender: ZmqSender[Progress] = zmq_sender(endpoint, name="learner", peer="launcher")
    async with receiver, sender:
        with pytest.raises(MessageError, match=r"more than the 100 that launcher takes. Raise wires.message_mb"):
            await sender.send(Progress(process="learner", phase="x" * 100))
        await sender.send(Progress(process="learner", phase="x"))
        assert (await anext(receiver)).phase == "x"


# ---------------------------------------------------------------- silence and death

SENDING_PROGRAM = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from azr_async.adapters.channels import zmq_sender
from azr_async.messages import BatchRequest
async def main():
    async with zmq_sender(sys.argv[2], name="doomed", peer="selfplay", heartbeat_seconds=0.02) as sender:
        await sender.send(BatchRequest(version=0))
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_killed_sender_is_named_once_and_the_others_go_on(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    async with receiver_at(f"ipc://{tmp_path}/s", senders=2, timeout_seconds=1.0) as receiver:
        arguments = ["-c", SENDING_PROGRAM, root, receiver.endpoint]
        doomed = await asyncio.create_subprocess_exec(sys.executable, *arguments)
        assert (await anext(receiver)).version == 0
        async with sender_to(receiver.endpoint, "survivor") as survivor:
            assert set(receiver.senders) == {"doomed", "survivor"}
            doomed.send_signal(signal.SIGKILL)
            await doomed.wait()
            with pytest.raises(PeerVanished, match=r"doomed at ipc://.*/s .*not answered for 1\.0.*logs/doomed\.log"):
                await anext(receiver)
            assert receiver.senders == ("survivor",)
            await survivor.send(BatchRequest(version=1))
            assert (await anext(receiver)).version == 1
        await replace_the_lost_one(receiver)


async def replace_the_lost_one(receiver: ZmqReceiver[BatchRequest]) -> None:
    """One that vanished has not closed, so the channel is open until another has taken its place and closed."""
    async with sender_to(receiver.endpoint, "heir") as heir:
        await heir.send(BatchRequest(version=3))
    assert [message.version async for message in receiver] == [3]


async def test_many_senders_share_a_context_and_none_notices_that_another_leaves(tmp_path: Path) -> None:
    workers = [receiver_at(f"ipc://{tmp_path}/{number}") for number in range(8)]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        context = await stack.enter_async_context(shared_context())
        threads = threads_of_this_process()
        async with sender_to(workers[0].endpoint, context=context) as stays:
            for worker in workers[1:]:
                async with sender_to(worker.endpoint, context=context) as sender:
                    await sender.send(BatchRequest(version=1))
                    assert threads_of_this_process() <= threads + 2
                assert [message.version async for message in worker] == [1]
            await stays.send(BatchRequest(version=2))
            assert (await anext(workers[0])).version == 2


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("messages", [2, 1], ids=["waiting for credit", "leaving"])
async def test_a_receiver_that_falls_silent_is_named_once(tmp_path: Path, messages: int) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with raw_socket(zmq.ROUTER, endpoint) as silent, asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(told_losses(endpoint, messages))
        identity, *_ = await silent.recv_multipart()
        await silent.send_multipart([identity, *welcome(1)])
        [loss] = await sending
    assert loss.startswith(f"selfplay at {endpoint}")
    assert "has not answered for 0.2" in loss
    assert "logs/selfplay.log" in loss


async def told_losses(endpoint: str, messages: int) -> list[str]:
    """What a sender is told when it has credit for one message and then hears nothing."""
    losses = []
    try:
        async with sender_to(endpoint, timeout_seconds=TIMEOUT_SECONDS) as sender:
            for version in range(messages):
                try:
                    await sender.send(BatchRequest(version=version))
                except PeerVanished as loss:
                    losses.append(str(loss))
    except PeerVanished as loss:
        losses.append(str(loss))
    return losses


RECEIVING_PROGRAM = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from azr_async.adapters.channels import zmq_receiver
from azr_async.messages import BatchRequest
async def main():
    requests = zmq_receiver(sys.argv[2], (BatchRequest,), name="requests", capacity=4, heartbeat_seconds=10.0)
    async with requests:
        async for _ in requests:
            pass
asyncio.run(main())
"""


async def test_a_killed_receiver_is_named_at_once_not_when_its_silence_is_noticed(tmp_path: Path) -> None:
    root, endpoint = str(Path(__file__).parents[2]), f"ipc://{tmp_path}/s"
    doomed = await asyncio.create_subprocess_exec(sys.executable, "-c", RECEIVING_PROGRAM, root, endpoint)
    async with sender_to(endpoint, beat_seconds=10.0, timeout_seconds=1000.0) as sender:
        doomed.send_signal(signal.SIGKILL)
        await doomed.wait()
        async with asyncio.timeout(5.0):
            end = await sender.ended()
        assert isinstance(end, PeerVanished)
        assert f"selfplay at {endpoint} has died: its connection to learner broke. Look at logs/selfplay.log" in str(
            end
        )
        with pytest.raises(PeerVanished, match="has died"):
            await sender.send(BatchRequest(version=1))


async def test_connecting_to_nobody_ends_at_the_deadline_and_names_who_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PeerVanished, match=rf"selfplay at ipc://{tmp_path}/s .*0\.1 s.*logs/selfplay\.log"):
        async with sender_to(f"ipc://{tmp_path}/s", connect_seconds=0.1):
            pass


async def test_a_sender_may_be_there_before_its_receiver(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(send_one(endpoint))
        await asyncio.wait([sending], timeout=0.05)
        async with receiver_at(endpoint) as receiver:
            assert [message.version async for message in receiver] == [1]


async def send_more_than_fits(sender: ZmqSender[BatchRequest]) -> None:
    for version in range(5):
        await sender.send(BatchRequest(version=version))


async def test_a_sender_that_was_given_up_is_told_so(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with (
        receiver_at(endpoint, timeout_seconds=TIMEOUT_SECONDS) as receiver,
        sender_to(endpoint, beat_seconds=60.0) as mute,
    ):
        with pytest.raises(PeerVanished, match="learner"):
            await anext(receiver)
        with pytest.raises(PeerVanished, match="no longer knows learner"):
            await send_more_than_fits(mute)
        assert receiver.refused > 0


async def test_senders_that_never_join_are_missed_at_the_deadline(tmp_path: Path) -> None:
    receiver = receiver_at(f"ipc://{tmp_path}/s", senders=2, join_seconds=0.1)
    async with receiver, sender_to(receiver.endpoint) as sender:
        with pytest.raises(PeerVanished, match=r"needs 2 senders, but .* only learner was there"):
            await anext(receiver)
        await sender.send(BatchRequest(version=1))
        assert (await anext(receiver)).version == 1


async def test_a_long_wait_is_no_silence(tmp_path: Path) -> None:
    receiver = receiver_at(f"ipc://{tmp_path}/s", capacity=1, timeout_seconds=TIMEOUT_SECONDS)
    async with receiver, sender_to(receiver.endpoint, timeout_seconds=TIMEOUT_SECONDS) as sender:
        await sender.send(BatchRequest(version=0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * TIMEOUT_SECONDS):
                await sender.send(BatchRequest(version=1))
        assert (await anext(receiver)).version == 0
        await sender.send(BatchRequest(version=2))
        assert (await anext(receiver)).version == 2


async def test_a_greeting_that_nobody_answered_is_repeated(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with raw_socket(zmq.ROUTER, endpoint) as forgetful, asyncio.TaskGroup() as tasks:
        joining = tasks.create_task(send_one(endpoint))
        for _ in range(3):
            assert tuple((await forgetful.recv_multipart())[1:]) == said(protocol.HELLO, b"learner")
        joining.cancel()


async def test_a_sender_that_is_cancelled_while_it_joins_has_closed(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with raw_socket(zmq.ROUTER, endpoint) as slow, asyncio.TaskGroup() as tasks:
        joining = tasks.create_task(send_one(endpoint))
        _, *greeting = await slow.recv_multipart()
        assert tuple(greeting) == said(protocol.HELLO, b"learner")
        joining.cancel()
        while greeting[0] == protocol.HELLO:
            _, *greeting = await slow.recv_multipart()
        assert tuple(greeting) == said(protocol.CLOSE, protocol.number_frame(0))


# ---------------------------------------------------------------- lost, repeated and damaged on the way


async def test_a_message_that_comes_twice_is_taken_once(tmp_path: Path) -> None:
    async with receiver_at(f"ipc://{tmp_path}/s") as receiver:
        async with raw_socket(zmq.DEALER, receiver.endpoint) as sender:
            await sender.send_multipart(said(protocol.HELLO, b"learner"))
            for number in (1, 1, 2, 1, 2):
                await sender.send_multipart(data(number, wire.encode(BatchRequest(version=number))))
            await sender.send_multipart(said(protocol.CLOSE, protocol.number_frame(2)))
            assert [message.version async for message in receiver] == [1, 2]
        assert receiver.refused == 3


@pytest.mark.parametrize("how", ["lost", "changed", "lost at the end"])
async def test_where_a_message_is_missing_or_changed_both_ends_are_told(tmp_path: Path, how: str) -> None:
    first, second, third = (data(n, wire.encode(BatchRequest(version=n))) for n in (1, 2, 3))
    rest = {
        "lost": [third],
        "changed": [(*second[:2], wire.encode(BatchRequest(version=9)), second[3])],
        "lost at the end": [said(protocol.BEAT, protocol.number_frame(2))],
    }[how]
    async with (
        receiver_at(f"ipc://{tmp_path}/s") as receiver,
        raw_socket(zmq.DEALER, receiver.endpoint) as sender,
    ):
        for frames in (said(protocol.HELLO, b"learner"), first, *rest):
            await sender.send_multipart(frames)
        assert (await anext(receiver)).version == 1
        with pytest.raises(PeerVanished, match="message 2 from learner to here was lost or damaged"):
            await anext(receiver)
        answer = await sender.recv_multipart()
        while answer[0] in (protocol.WELCOME, protocol.ALLOW):
            answer = await sender.recv_multipart()
        assert tuple(answer) == said(protocol.DAMAGED, protocol.number_frame(2))


async def test_a_sender_that_hears_of_damage_says_so(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with raw_socket(zmq.ROUTER, endpoint) as receiver, asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(told_losses(endpoint, 2))
        identity, *_ = await receiver.recv_multipart()
        await receiver.send_multipart([identity, *welcome(1)])
        await receiver.send_multipart([identity, *said(protocol.DAMAGED, protocol.number_frame(1))])
        await receiver.send_multipart([identity, *said(protocol.UNKNOWN)])  # to what was on its way already
        loss, *_ = await sending
    assert "message 1 from here to selfplay was lost or damaged" in loss


async def test_a_farewell_that_was_lost_is_said_again(tmp_path: Path) -> None:
    async with (
        receiver_at(f"ipc://{tmp_path}/s") as receiver,
        raw_socket(zmq.DEALER, receiver.endpoint) as sender,
    ):
        await sender.send_multipart(said(protocol.HELLO, b"learner"))
        assert (await sender.recv_multipart())[0] == protocol.WELCOME
        for _ in range(2):
            await sender.send_multipart(said(protocol.CLOSE, protocol.number_frame(0)))
            assert tuple(await sender.recv_multipart()) == said(protocol.GOODBYE)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("tcp://0.0.0.0:5555", "not a local address"),
        ("tcp://*:5555", "not a local address"),
        ("tcp://192.168.1.2:5555", "not a local address"),
        ("tcp://example.org:5555", "not a local address"),
        ("tcp://:5555", "not a local address"),
        ("inproc://here", "not a local address"),
        ("udp://127.0.0.1:5555", "not a local address"),
        ("127.0.0.1:5555", "not a local address"),
        ("", "not a local address"),
        ("tcp://127.0.0.1", "not a local address"),
        ("tcp://127.0.0.1:", "no usable port"),
        ("tcp://127.0.0.1:0", "no usable port"),
        ("tcp://127.0.0.1:65536", "no usable port"),
        ("tcp://127.0.0.1:x", "no usable port"),
        ("ipc://", "names no file"),
        ("ipc://*", "names no file"),
        ("ipc://@hidden", "names no file"),
        ("ipc:///no/such/folder/s", "no folder /no/such/folder"),
        ("ipc:///tmp/" + LONGEST_IPC_PATH_BYTES * "n", "too long"),
    ],
)
def test_an_address_that_leaves_this_host_or_cannot_be_is_refused_by_both_ends(endpoint: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        receiver_at(endpoint)
    with pytest.raises(ConfigError, match=complaint):
        sender_to(endpoint)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "n" * 101])
def test_a_name_that_cannot_stand_in_a_log_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a sender"):
        sender_to(f"ipc://{tmp_path}/s", name)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_loopback_works_and_the_system_may_pick_the_port(host: str) -> None:
    async with receiver_at(f"tcp://{host}:*") as receiver:
        assert not receiver.endpoint.endswith("*")
        await send_one(receiver.endpoint)
        assert [message.version async for message in receiver] == [1]


async def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with sockets.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{endpoint} is in use .* choose another port"):
            async with receiver_at(endpoint):
                pass


async def test_the_socket_file_of_a_living_receiver_is_not_taken_from_it(tmp_path: Path) -> None:
    async with receiver_at(f"ipc://{tmp_path}/s") as receiver:
        with pytest.raises(ConfigError, match="is in use"):
            async with receiver_at(f"ipc://{tmp_path}/s"):
                pass
        await send_one(receiver.endpoint)
        assert [message.version async for message in receiver] == [1]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_a_socket_file_that_a_killed_process_left_is_taken_over_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    async with receiver_at(f"ipc://{path}") as receiver:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await send_one(receiver.endpoint)
        assert [message.version async for message in receiver] == [1]
    assert names_in(tmp_path) == []


async def test_an_address_is_free_again_as_soon_as_its_receiver_has_left(tmp_path: Path) -> None:
    for version in range(5):
        async with receiver_at(f"ipc://{tmp_path}/s") as receiver, asyncio.TaskGroup() as tasks:
            tasks.create_task(send_one(receiver.endpoint))
            assert len([message async for message in receiver]) == 1, version
    assert names_in(tmp_path) == []


async def test_a_sender_is_told_that_its_receiver_has_left(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    async with AsyncExitStack() as stack:
        async with receiver_at(endpoint):
            sender = await stack.enter_async_context(sender_to(endpoint))
        with pytest.raises(ChannelClosed, match=r"selfplay has closed .*logs/selfplay\.log"):
            await send_more_than_fits(sender)
