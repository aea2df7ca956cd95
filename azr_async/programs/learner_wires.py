"""The learner's ends of the wires to self-play and to the inference workers."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.config import Config
from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import (
    BatchRequest,
    EvaluationRequest,
    EvaluationResult,
    JoinWeights,
    Message,
    PushWeights,
    RolloutBatch,
    WeightsInstalled,
    WeightsJoined,
    WeightsReady,
    WorkerReady,
)
from azr_async.programs.wiring import endpoint

M = TypeVar("M", bound=Message)
FromWorker = TypeVar("FromWorker", WorkerReady, WeightsJoined, WeightsInstalled)

CAPACITY = 16
"""Unread messages per sender; the learner asks before it is sent anything, so few are ever under way."""


class StopRequested(Exception):
    """A stop was requested before the first step; nothing has to be saved."""


class Inbox:
    """Messages sorted by kind, for whoever waits for one kind."""

    def __init__(self) -> None:
        self._waiting: defaultdict[type, asyncio.Queue[Message | None]] = defaultdict(asyncio.Queue)

    async def fill(self, receiver: ZmqReceiver[M], peers: str) -> None:
        """Sort what arrives; raises ChannelClosed if the peers close, for the learner is always the first to."""
        async for message in receiver:
            self._waiting[type(message)].put_nowait(message)
        raise ChannelClosed(f"{peers} ended before the learner did. Look at the end of their logs.")

    async def interrupt(self, stop: asyncio.Event) -> None:
        """Once `stop` is set, who waits for a batch or an evaluation gets None, who waits for a start gives up."""
        await stop.wait()
        for kind in (RolloutBatch, EvaluationResult, WorkerReady, WeightsJoined):
            self._waiting[kind].put_nowait(None)

    async def next(self, kind: type[M], *, deadline_seconds: float, whom: str) -> M | None:
        """The oldest message of `kind`. Raises PeerVanished, naming `whom`, after the deadline."""
        try:
            async with asyncio.timeout(deadline_seconds):
                message = await self._waiting[kind].get()
        except TimeoutError:
            raise PeerVanished(
                f"no {kind.__name__} from {whom} within {deadline_seconds:g} s. Look at the end of logs/{whom}.log; "
                "raise wires.step_seconds if it is only slow."
            ) from None
        if message is None:
            self._waiting[kind].put_nowait(None)
        assert message is None or isinstance(message, kind)
        return message

    async def from_each(
        self,
        kind: type[FromWorker],
        workers: Collection[str],
        *,
        deadline_seconds: float,
        setting: str,
        wanted: Callable[[FromWorker], bool] = lambda message: True,
    ) -> dict[str, FromWorker]:
        """One message of `kind` from each worker; others than `wanted` are passed over.

        Raises PeerVanished after the deadline; it names who is missing, and the setting of the deadline.
        Raises StopRequested when a stop was requested before they were there.
        """
        found: dict[str, FromWorker] = {}
        try:
            async with asyncio.timeout(deadline_seconds):
                while missing := sorted(set(workers) - set(found)):
                    message = await self._waiting[kind].get()
                    if message is None:
                        raise StopRequested
                    if isinstance(message, kind) and wanted(message):
                        found[message.worker] = message
        except TimeoutError:
            logs = ", ".join(f"logs/{worker}.log" for worker in missing)
            raise PeerVanished(
                f"no {kind.__name__} from {', '.join(missing)} within {deadline_seconds:g} s. "
                f"Look at the end of {logs}; raise {setting} if it is only slow."
            ) from None
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Wires:
    """Everything open."""

    inbox: Inbox
    requests: ZmqSender[BatchRequest | EvaluationRequest | WeightsReady]
    workers: dict[str, ZmqSender[PushWeights | JoinWeights]]
    ranks: dict[str, int]
    """How many ranks of the broadcast group each worker is."""


@asynccontextmanager
async def open_wires(config: Config, wires_dir: Path, name: str, stop: asyncio.Event) -> AsyncIterator[Wires]:
    """Listen, wait until all workers are ready, connect to everybody; closed again in the opposite order.

    Raises PeerVanished, naming who is missing, when that takes longer than `wires.start_seconds`.
    """
    batches: ZmqReceiver[RolloutBatch | EvaluationResult] = zmq_receiver(
        endpoint(config, wires_dir, "learner-batches"),
        (RolloutBatch, EvaluationResult),
        name="learner-batches",
        capacity=CAPACITY,
        join_seconds=config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )
    answers: ZmqReceiver[WorkerReady | WeightsJoined | WeightsInstalled] = zmq_receiver(
        endpoint(config, wires_dir, "learner-weights"),
        (WorkerReady, WeightsJoined, WeightsInstalled),
        name="learner-weights",
        capacity=CAPACITY,
        expected_senders=config.inference_workers,
        join_seconds=config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )
    inbox = Inbox()
    async with batches, answers, asyncio.TaskGroup() as group:
        readers = [
            group.create_task(inbox.fill(batches, "self-play"), name="read batches"),
            group.create_task(inbox.fill(answers, "the inference workers"), name="read answers"),
            group.create_task(inbox.interrupt(stop), name="stop"),
        ]
        async with AsyncExitStack() as stack:
            try:
                yield await _connected(config, wires_dir, name, inbox, stack)
            finally:
                # Before the senders close: the peers end with them, and that is no failure. Nor may it hide one.
                for reader in readers:
                    reader.cancel()


async def _connected(config: Config, wires_dir: Path, name: str, inbox: Inbox, stack: AsyncExitStack) -> Wires:
    async def connect(wire: str, peer: str) -> ZmqSender[M]:
        sender: ZmqSender[M] = zmq_sender(
            endpoint(config, wires_dir, wire),
            name=name,
            peer=peer,
            heartbeat_seconds=config.wires.heartbeat_seconds,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
            connect_seconds=config.wires.start_seconds,
        )
        return await stack.enter_async_context(sender)

    names = [f"inference-{index}" for index in range(config.inference_workers)]
    ready = await inbox.from_each(
        WorkerReady, names, deadline_seconds=config.wires.start_seconds, setting="wires.start_seconds"
    )
    workers: dict[str, ZmqSender[PushWeights | JoinWeights]] = {
        worker: await connect(f"{worker}-push", worker) for worker in names
    }
    return Wires(
        inbox=inbox,
        requests=await connect("selfplay-requests", "selfplay"),
        workers=workers,
        ranks={worker: ready[worker].ranks for worker in names},
    )
