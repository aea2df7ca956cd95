"""The learner's way to self-play, whoever that is by now: what one that is lost was told and asked, the next one is."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

from azr_async.errors import ChannelClosed, PeerVanished
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
from azr_async.ports import Sender

Request = BatchRequest | EvaluationRequest | StateRequest
ToSelfPlay = Handover | Request | SelfPlayState | WeightsReady
Reply = RolloutBatch | EvaluationResult | SelfPlayState
Connect = Callable[[], Sender[ToSelfPlay]]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Conversation:
    """What self-play was told and asked, and what has come back. Each request is answered once, whoever answers it."""

    incarnation: int = 0
    """Of the self-play that counts now."""
    _start: SelfPlayState | None = None
    _weights: WeightsReady | None = None
    _open: list[Request] = field(default_factory=list)
    _held: set[int] = field(default_factory=set)
    """Versions of the batches that have come and that the installed weights do not contain yet."""
    _has_begun: bool = False
    """A batch has come, or a state: something of self-play is in the weights or in a checkpoint."""

    def said(self, message: ToSelfPlay) -> None:
        """The learner says something; what it has left behind need not be said again."""
        match message:
            case SelfPlayState():
                self._start = message
            case WeightsReady(version=version):
                self._weights = message
                self._open = [request for request in self._open if request.version >= version]
                self._held = {held for held in self._held if held >= version}
            case BatchRequest() | EvaluationRequest() | StateRequest():
                self._open.append(message)

    def takes(self, reply: Reply) -> bool:
        """Is this what somebody waits for? What comes twice, or from one that was counted as lost, is not."""
        kinds = {RolloutBatch: BatchRequest, EvaluationResult: EvaluationRequest, SelfPlayState: StateRequest}
        kind = kinds[type(reply)]
        asked = [one for one in self._open if isinstance(one, kind) and one.version == reply.version]
        if not asked or reply.incarnation != self.incarnation:
            return False
        self._open.remove(asked[0])
        self._has_begun = self._has_begun or not isinstance(reply, EvaluationResult)
        if isinstance(reply, RolloutBatch):
            self._held.add(reply.version)
        return True

    def begin_anew(self) -> list[ToSelfPlay]:
        """Count self-play as lost; returns what the next one has to hear. From now on only that one's replies count."""
        self.incarnation += 1
        handover = Handover(incarnation=self.incarnation, has_begun=self._has_begun, held=tuple(sorted(self._held)))
        start = [] if self._has_begun or self._start is None else [self._start]
        weights = [] if self._weights is None else [self._weights]
        return [handover, *start, *weights, *self._open]


class Link:
    """Says everything in order. When self-play is lost it waits for the next one, and says again what that has to hear.

    Whether there will be a next one is for the launcher to know: it ends the run if there will not.
    """

    def __init__(self, connect: Connect, *, on_lost: Callable[[], None], on_found: Callable[[], None]) -> None:
        """`connect` waits for whoever comes next, and has a deadline for that.

        `on_lost` and `on_found` are called when nobody, and when somebody works on what was asked.
        """
        self.conversation = Conversation()
        self._connect, self._on_lost, self._on_found = connect, on_lost, on_found
        self._outbox: asyncio.Queue[ToSelfPlay | None] = asyncio.Queue()
        self._patience = asyncio.timeout(None)
        self._is_waiting = self._is_hurried = self._is_closed = False

    async def send(self, message: ToSelfPlay) -> None:
        """Say it, if need be to the next one; never waits."""
        self.conversation.said(message)
        self._outbox.put_nowait(message)

    def hurry(self) -> None:
        """Wait no longer for a next one: the run is to stop."""
        self._is_hurried = True
        if self._is_waiting and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        """That was all: `run` ends when it has been said."""
        self._is_closed = True
        self._outbox.put_nowait(None)
        self.hurry()

    async def run(self) -> None:
        """Be connected until `close`. Raises PeerVanished when self-play does not come, or not again."""
        why = await self._talk()
        while why:
            log.warning("self-play was lost; another one is to go on from the journal: %s", why)
            self._on_lost()
            why = await self._talk_again(why)

    async def _talk_again(self, lost: str) -> str:
        try:
            return await self._talk(is_again=True)
        except (TimeoutError, PeerVanished, ChannelClosed) as problem:
            if self._is_closed:
                return ""
            silence = "the run was stopped before another one came" if self._is_hurried else str(problem)
            raise PeerVanished(
                f"self-play was lost: {lost} No other took its place: {silence}. Look at logs/selfplay.log, "
                "then continue with --resume."
            ) from problem

    async def _talk(self, *, is_again: bool = False) -> str:
        """Reach self-play and say what there is to say; why no more can be said, or nothing when that was all."""
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(0.0 if is_again and self._is_hurried else None) as self._patience:
                self._is_waiting = is_again
                try:
                    way = await stack.enter_async_context(self._connect())
                finally:
                    self._is_waiting = False
            if is_again:
                self._say_anew()
            why = await self._say_all(way)
            if why:
                return why
            with suppress(PeerVanished):  # it was needed no longer
                await stack.aclose()
        return ""

    def _say_anew(self) -> None:
        """Whatever was to be said is part of what the next one has to hear."""
        self._outbox = asyncio.Queue()
        for message in self.conversation.begin_anew():
            self._outbox.put_nowait(message)
        if self._is_closed:
            self._outbox.put_nowait(None)
        self._on_found()

    async def _say_all(self, way: Sender[ToSelfPlay]) -> str:
        async def say() -> bool:
            with suppress(PeerVanished, ChannelClosed):  # `ended` tells
                while (message := await self._outbox.get()) is not None:
                    await way.send(message)
                return True
            return False

        async with asyncio.TaskGroup() as group:
            saying = group.create_task(say(), name="to self-play")
            ending = group.create_task(way.ended(), name="self-play ended")
            await asyncio.wait([saying, ending], return_when=asyncio.FIRST_COMPLETED)
            if saying.done() and saying.result():
                ending.cancel()
                return ""
            saying.cancel()
            return str(await ending)
