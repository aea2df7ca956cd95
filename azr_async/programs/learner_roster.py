"""The inference workers as the learner sees them: who can be reached now."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import JoinWeights, PushWeights, WorkerReady
from azr_async.ports import Sender

Orders = Sender[PushWeights | JoinWeights]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A worker that can be reached."""

    name: str
    incarnation: int
    ranks: int
    """How many ranks of the broadcast group it is."""
    orders: Orders


class Roster:
    """Opens a way to each worker that announces itself, and strikes off who is gone."""

    def __init__(
        self, connect: Callable[[WorkerReady], Orders], tasks: asyncio.TaskGroup, *, on_change: Callable[[], None]
    ) -> None:
        """`tasks` is where the ways are kept open; it ends when `close` was called."""
        self.members: dict[str, Member] = {}
        self._connect, self._tasks, self._on_change = connect, tasks, on_change
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.Event] = {}
        self._is_closed = False

    def welcome(self, ready: WorkerReady) -> None:
        """A worker is there; one of its name that was there before is gone."""
        self._drop(ready.worker, "it was started again")
        if not self._is_closed:
            leaving = self._leaving[ready.worker] = asyncio.Event()
            keeper = self._tasks.create_task(self._keep(ready, leaving), name=f"orders for {ready.worker}")
            self._keepers[ready.worker] = keeper

    def has(self, member: Member) -> bool:
        """Can it still be reached, itself and not only one of its name?"""
        return self.members.get(member.name) is member

    def give_up(self, member: Member, why: str) -> None:
        """Count no longer on a worker: its way is closed. It has to end, and to be started again, to come back."""
        if self.has(member):
            self._drop(member.name, why)

    def close(self) -> None:
        """Tell every worker that this was all."""
        self._is_closed = True
        for leaving in self._leaving.values():
            leaving.set()

    async def _keep(self, ready: WorkerReady, leaving: asyncio.Event) -> None:
        """Keep the way to a worker open until it is gone or `leaving` is set."""
        name, why = ready.worker, ""
        try:
            async with self._connect(ready) as orders, asyncio.TaskGroup() as group:
                self.members[name] = Member(name=name, incarnation=ready.incarnation, ranks=ready.ranks, orders=orders)
                log.info("inference worker %s is there", name)
                self._on_change()

                async def watch() -> None:
                    nonlocal why
                    why = str(await orders.ended())
                    leaving.set()

                watching = group.create_task(watch(), name=f"watch {name}")
                await leaving.wait()
                watching.cancel()
        except (PeerVanished, ChannelClosed) as problem:
            why = str(problem)
        if not self._is_closed:
            del self._keepers[name]
            self._strike_off(name, why)

    def _drop(self, name: str, why: str) -> None:
        if name in self._keepers:
            self._keepers.pop(name).cancel()
            self._strike_off(name, why)

    def _strike_off(self, name: str, why: str) -> None:
        if self.members.pop(name, None) is not None:
            others = ", ".join(sorted(self.members)) or "nobody, until one comes back"
            log.warning("inference worker %s was lost; the run goes on with %s: %s", name, others, why)
        else:
            log.warning("inference worker %s could not be reached: %s", name, why)
        self._on_change()
