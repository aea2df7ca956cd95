"""The learner's ends of the wires to self-play and to the inference workers."""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
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
    SelfPlayState,
    StateRequest,
    WeightsInstalled,
    WeightsJoined,
    WeightsReady,
    WorkerReady,
)
from azr_async.programs.learner_roster import Roster
from azr_async.programs.wiring import endpoint

T = TypeVar("T")
M = TypeVar("M", bound=Message)
FromSelfPlay = TypeVar("FromSelfPlay", RolloutBatch, EvaluationResult, SelfPlayState)
ToSelfPlay = BatchRequest | EvaluationRequest | StateRequest | SelfPlayState | WeightsReady
FromWorker = TypeVar("FromWorker", WeightsJoined, WeightsInstalled)
Batches = ZmqReceiver[RolloutBatch | EvaluationResult | SelfPlayState]
Answers = ZmqReceiver[WorkerReady | WeightsJoined | WeightsInstalled]

CAPACITY = 16
"""Unread messages per sender; the learner asks before it is sent anything, so few are ever under way."""

log = logging.getLogger(__name__)


class StopRequested(Exception):
    """A stop was requested before the first step; nothing has to be saved."""


class Inbox:
    """Messages sorted by kind, for whoever waits for one kind."""

    def __init__(self) -> None:
        self.is_stopping = False
        self._waiting: defaultdict[type, deque[Message]] = defaultdict(deque)
        self._news = asyncio.Event()

    def put(self, message: Message) -> None:
        """A message has come."""
        self._waiting[type(message)].append(message)
        self._news.set()

    def wake(self) -> None:
        """Have everybody who waits look again."""
        self._news.set()

    async def interrupt(self, stop: asyncio.Event) -> None:
        """Once `stop` is set, who waits for self-play gets None, who waits for the start gives up."""
        await stop.wait()
        self.is_stopping = True
        self.wake()

    async def until(self, condition: Callable[[], T | None]) -> T:
        """Wait until the condition gives something. It is asked again whenever there is news."""
        while (found := condition()) is None:
            self._news.clear()
            await self._news.wait()
        return found

    async def next(
        self,
        kind: type[FromSelfPlay],
        *,
        version: int,
        deadline_seconds: float,
        unless: Callable[[], bool] = lambda: False,
        also_when_stopping: bool = False,
    ) -> FromSelfPlay | None:
        """What self-play has made with weights of `version`; what is older is passed over.

        None when a stop is requested (not if `also_when_stopping`) or when `unless` becomes true first.
        Raises PeerVanished after the deadline.
        """

        def found() -> FromSelfPlay | bool | None:
            while self._waiting[kind]:
                message = self._waiting[kind].popleft()
                if isinstance(message, kind) and message.version == version:
                    return message
            return True if (self.is_stopping and not also_when_stopping) or unless() else None

        try:
            async with asyncio.timeout(deadline_seconds):
                message = await self.until(found)
        except TimeoutError:
            raise PeerVanished(
                f"no {kind.__name__} from selfplay within {deadline_seconds:g} s. Look at the end of "
                "logs/selfplay.log; raise wires.step_seconds if it is only slow."
            ) from None
        return message if isinstance(message, kind) else None

    async def from_each(
        self,
        kind: type[FromWorker],
        workers: Callable[[], Collection[str]],
        *,
        deadline_seconds: float,
        wanted: Callable[[FromWorker], bool],
    ) -> dict[str, FromWorker]:
        """One `wanted` message of `kind` from each of the workers, as long as they are there; others are passed over.

        After the deadline: those that have come.
        """
        answers: dict[str, FromWorker] = {}

        def is_complete() -> bool | None:
            while self._waiting[kind]:
                message = self._waiting[kind].popleft()
                if isinstance(message, kind) and wanted(message):
                    answers[message.worker] = message
            return set(workers()) <= answers.keys() or None

        try:
            async with asyncio.timeout(deadline_seconds):
                await self.until(is_complete)
        except TimeoutError:
            pass
        return answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Wires:
    """Everything open."""

    inbox: Inbox
    requests: ZmqSender[ToSelfPlay]
    roster: Roster


@asynccontextmanager
async def open_wires(config: Config, wires_dir: Path, name: str, stop: asyncio.Event) -> AsyncIterator[Wires]:
    """Listen, wait until all workers are ready, connect to everybody; closed again in the opposite order.

    Raises PeerVanished, naming who is missing, when that takes longer than `wires.start_seconds`; StopRequested when
    `stop` was set before they were there.
    """

    def connect(address: str, peer: str) -> ZmqSender[M]:
        return zmq_sender(
            address,
            name=name,
            peer=peer,
            heartbeat_seconds=config.wires.heartbeat_seconds,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
            connect_seconds=config.wires.start_seconds,
        )

    def connect_worker(ready: WorkerReady) -> ZmqSender[PushWeights | JoinWeights]:
        return connect(endpoint(config, wires_dir, f"{ready.worker}-push"), ready.worker)

    inbox = Inbox()
    batches, answers = _batches(config, wires_dir), _answers(config, wires_dir)
    async with batches, answers, asyncio.TaskGroup() as group:
        roster = Roster(connect_worker, group, on_change=inbox.wake)
        readers = [
            group.create_task(_hear_selfplay(batches, inbox), name="read batches"),
            group.create_task(_hear_workers(answers, inbox, roster), name="read answers"),
            group.create_task(inbox.interrupt(stop), name="stop"),
        ]
        try:
            await _all_there(config, inbox, roster)
            requests: ZmqSender[ToSelfPlay] = connect(endpoint(config, wires_dir, "selfplay-requests"), "selfplay")
            async with requests:
                try:
                    yield Wires(inbox=inbox, requests=requests, roster=roster)
                finally:
                    # Before the senders close: the peers end with them, and that is no failure. Nor may it hide one.
                    _cancel(readers)
        finally:
            _cancel(readers)
            roster.close()


async def _hear_selfplay(batches: Batches, inbox: Inbox) -> None:
    """Sort what arrives; the learner is always the first to close."""
    async for message in batches:
        inbox.put(message)
    raise ChannelClosed("self-play ended before the learner did. Look at the end of its log.")


async def _hear_workers(answers: Answers, inbox: Inbox, roster: Roster) -> None:
    """Sort what arrives. A worker that falls silent is noticed by the roster; the others are heard on."""
    while True:
        try:
            async for message in answers:
                if isinstance(message, WorkerReady):
                    roster.welcome(message)
                else:
                    inbox.put(message)
            break
        except PeerVanished as silence:
            log.warning("%s", silence)
    raise ChannelClosed("the inference workers ended before the learner did. Look at the end of their logs.")


async def _all_there(config: Config, inbox: Inbox, roster: Roster) -> None:
    names, seconds = {f"inference-{index}" for index in range(config.inference_workers)}, config.wires.start_seconds
    try:
        async with asyncio.timeout(seconds):
            await inbox.until(lambda: inbox.is_stopping or names <= roster.members.keys() or None)
    except TimeoutError:
        missing = sorted(names - roster.members.keys())
        logs = ", ".join(f"logs/{worker}.log" for worker in missing)
        raise PeerVanished(
            f"no WorkerReady from {', '.join(missing)} within {seconds:g} s. "
            f"Look at the end of {logs}; raise wires.start_seconds if it is only slow."
        ) from None
    if inbox.is_stopping:
        raise StopRequested


def _cancel(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


def _batches(config: Config, wires_dir: Path) -> Batches:
    return zmq_receiver(
        endpoint(config, wires_dir, "learner-batches"),
        (RolloutBatch, EvaluationResult, SelfPlayState),
        name="learner-batches",
        capacity=CAPACITY,
        join_seconds=config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )


def _answers(config: Config, wires_dir: Path) -> Answers:
    return zmq_receiver(
        endpoint(config, wires_dir, "learner-weights"),
        (WorkerReady, WeightsJoined, WeightsInstalled),
        name="learner-weights",
        capacity=CAPACITY,
        # One that failed has closed as well: only when all that may be started again have closed, nobody is left.
        expected_senders=config.inference_workers * (1 + config.run.max_restarts),
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )
