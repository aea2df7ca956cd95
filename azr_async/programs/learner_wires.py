"""The learner's ends of the wires to self-play and to the inference workers."""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from azr_async.adapters.channels import ZmqContext, ZmqReceiver, ZmqSender, shared_context, zmq_receiver, zmq_sender
from azr_async.config import Config
from azr_async.errors import PeerVanished
from azr_async.messages import (
    EvaluationResult,
    GivenUp,
    JoinWeights,
    Message,
    PushWeights,
    RolloutBatch,
    SelfPlayState,
    WeightsInstalled,
    WeightsJoined,
    WorkerReady,
)
from azr_async.programs.learner_link import Link, ToSelfPlay
from azr_async.programs.learner_roster import Roster
from azr_async.programs.wiring import endpoint

T = TypeVar("T")
M = TypeVar("M", bound=Message)
FromSelfPlay = TypeVar("FromSelfPlay", RolloutBatch, EvaluationResult, SelfPlayState)
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
        self._deadlines: dict[asyncio.Timeout, float] = {}  # of those who wait for self-play
        self._is_held = False

    def put(self, message: Message) -> None:
        """A message has come."""
        self._waiting[type(message)].append(message)
        self._news.set()

    def wake(self) -> None:
        """Have everybody who waits look again."""
        self._news.set()

    def stop(self) -> None:
        """Who waits for self-play gets None, who waits for the start gives up."""
        self.is_stopping = True
        self.wake()

    def hold(self) -> None:
        """Nobody is there to answer: deadlines of those who wait for self-play do not run."""
        self._is_held = True
        for deadline in self._running():
            deadline.reschedule(None)

    def release(self) -> None:
        """Somebody is there again: the deadlines begin anew."""
        self._is_held = False
        now = asyncio.get_running_loop().time()
        for deadline in self._running():
            deadline.reschedule(now + self._deadlines[deadline])

    def _running(self) -> list[asyncio.Timeout]:
        return [deadline for deadline in self._deadlines if not deadline.expired()]

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
            async with asyncio.timeout(None if self._is_held else deadline_seconds) as deadline:
                self._deadlines[deadline] = deadline_seconds
                message = await self.until(found)
        except TimeoutError:
            raise PeerVanished(
                f"no {kind.__name__} from selfplay within {deadline_seconds:g} s. Look at the end of "
                "logs/selfplay.log; raise wires.step_seconds if it is only slow."
            ) from None
        finally:
            del self._deadlines[deadline]
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
    requests: Link
    roster: Roster


@asynccontextmanager
async def open_wires(config: Config, wires_dir: Path, name: str, stop: asyncio.Event) -> AsyncIterator[Wires]:
    """Listen, wait until all workers are ready, connect to everybody; closed again in the opposite order.

    Raises PeerVanished, naming who is missing, when that takes longer than `wires.start_seconds`; StopRequested when
    `stop` was set before they were there.
    """

    def connect(address: str, peer: str, context: ZmqContext | None = None) -> ZmqSender[M]:
        return zmq_sender(
            address,
            name=name,
            peer=peer,
            heartbeat_seconds=config.wires.heartbeat_seconds,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
            connect_seconds=config.wires.start_seconds,
            context=context,
        )

    def connect_worker(ready: WorkerReady) -> ZmqSender[PushWeights | JoinWeights | GivenUp]:
        return connect(endpoint(config, wires_dir, f"{ready.worker}-push"), ready.worker, context)

    def connect_selfplay() -> ZmqSender[ToSelfPlay]:
        return connect(endpoint(config, wires_dir, "selfplay-requests"), "selfplay")

    inbox = Inbox()
    batches, answers = _batches(config, wires_dir), _answers(config, wires_dir)
    async with shared_context() as context, batches, answers, asyncio.TaskGroup() as group:
        roster = Roster(connect_worker, group, on_change=inbox.wake)
        link = Link(connect_selfplay, on_lost=inbox.hold, on_found=inbox.release)
        readers = [
            group.create_task(_hear_selfplay(batches, inbox, link), name="read batches"),
            group.create_task(_hear_workers(answers, inbox, roster), name="read answers"),
            group.create_task(_stop_when_asked(stop, inbox, link), name="stop"),
        ]
        try:
            await _all_there(config, inbox, roster)
            talking = group.create_task(link.run(), name="to self-play")
            try:
                yield Wires(inbox=inbox, requests=link, roster=roster)
            except BaseException:
                talking.cancel()
                raise
            finally:
                # Before the senders close: the peers end with them, and that is no failure. Nor may it hide one.
                _cancel(readers)
            link.close()
            await asyncio.wait([talking])  # it has the deadlines of the wire
        finally:
            _cancel(readers)
            roster.close()


async def _stop_when_asked(stop: asyncio.Event, inbox: Inbox, link: Link) -> None:
    await stop.wait()
    inbox.stop()
    link.hurry()


async def _hear_selfplay(batches: Batches, inbox: Inbox, link: Link) -> None:
    """Sort what arrives. That self-play is lost is noticed by the way to it."""
    while True:
        try:
            message = await anext(batches)
        except PeerVanished as silence:
            log.warning("%s", silence)
            continue
        if link.conversation.takes(message):
            inbox.put(message)
        else:
            log.warning("%s of version %d was not waited for", type(message).__name__, message.version)


async def _hear_workers(answers: Answers, inbox: Inbox, roster: Roster) -> None:
    """Sort what arrives. A worker that falls silent is noticed by the roster; the others are heard on."""
    while True:
        try:
            message = await anext(answers)
        except PeerVanished as silence:
            log.warning("%s", silence)
            continue
        if isinstance(message, WorkerReady):
            roster.welcome(message)
        else:
            inbox.put(message)


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
        expected_senders=0,  # self-play may be started again
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
        expected_senders=0,  # workers may be started again, added and removed
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )
