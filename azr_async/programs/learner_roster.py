"""The inference workers as the learner sees them: who can be reached now."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import GivenUp, JoinWeights, PushWeights, WorkerReady
from azr_async.ports import Sender

Orders = Sender[PushWeights | JoinWeights | GivenUp]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A worker that can be reached."""

    name: str
    incarnation: int
    ranks: int
    """How many ranks of the broadcast group it is."""
    orders: Orders


@dataclass(slots=True)
class _Way:
    """To a worker, kept open by a task."""

    leaving: asyncio.Event
    """Set when it is no longer needed."""
    last_word: GivenUp | None = None
    """To be said before it is closed; the worker counts as lost from then on."""
    keeper: asyncio.Task[None] = field(init=False)


class Roster:
    """Opens a way to each worker that announces itself, and strikes off who is gone."""

    def __init__(
        self, connect: Callable[[WorkerReady], Orders], tasks: asyncio.TaskGroup, *, on_change: Callable[[], None]
    ) -> None:
        """`tasks` is where the ways are kept open; it ends when `close` was called."""
        self.members: dict[str, Member] = {}
        self._connect, self._tasks, self._on_change = connect, tasks, on_change
        self._ways: dict[str, _Way] = {}
        self._is_closed = False

    def welcome(self, ready: WorkerReady) -> None:
        """A worker is there; one of its name that was there before is gone."""
        self._drop(ready.worker, "it was started again")
        if not self._is_closed:
            way = self._ways[ready.worker] = _Way(asyncio.Event())
            way.keeper = self._tasks.create_task(self._keep(ready, way), name=f"orders for {ready.worker}")

    def has(self, member: Member) -> bool:
        """Can it still be reached, itself and not only one of its name?"""
        return self.members.get(member.name) is member

    def give_up(self, member: Member, why: str) -> None:
        """Count no longer on a worker, and tell it: it has to end, and to be started again, to come back."""
        if self.has(member):
            way = self._ways[member.name]
            way.last_word = GivenUp(why=why)
            way.leaving.set()
            self._strike_off(member.name, why)

    def close(self) -> None:
        """Tell every worker that this was all; nobody waits for one that was given up."""
        self._is_closed = True
        for way in self._ways.values():
            if way.last_word is not None:
                way.keeper.cancel()
            way.leaving.set()

    async def _keep(self, ready: WorkerReady, way: _Way) -> None:
        """Keep the way to a worker open until it is gone or the way is to be left."""
        name, why = ready.worker, ""
        try:
            async with self._connect(ready) as orders, asyncio.TaskGroup() as group:
                self.members[name] = Member(name=name, incarnation=ready.incarnation, ranks=ready.ranks, orders=orders)
                log.info("inference worker %s is there", name)
                self._on_change()

                async def watch() -> None:
                    nonlocal why
                    why = str(await orders.ended())
                    way.leaving.set()

                watching = group.create_task(watch(), name=f"watch {name}")
                await way.leaving.wait()
                if way.last_word is not None:
                    with suppress(PeerVanished, ChannelClosed):  # then it is gone indeed
                        await orders.send(way.last_word)
                watching.cancel()
        except (PeerVanished, ChannelClosed) as problem:
            why = str(problem)
        if not self._is_closed:
            del self._ways[name]
            if way.last_word is None:
                self._strike_off(name, why)

    def _drop(self, name: str, why: str) -> None:
        way = self._ways.pop(name, None)
        if way is not None:
            way.keeper.cancel()
            if way.last_word is None:
                self._strike_off(name, why)

    def _strike_off(self, name: str, why: str) -> None:
        if self.members.pop(name, None) is not None:
            others = ", ".join(sorted(self.members)) or "nobody, until one comes back"
            log.warning("inference worker %s was lost; the run goes on with %s: %s", name, others, why)
        else:
            log.warning("inference worker %s could not be reached: %s", name, why)
        self._on_change()
