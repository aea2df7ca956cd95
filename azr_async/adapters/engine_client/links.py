"""The ways to the inference workers: which are there, which have the newest weights, what they report."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import CancelJob, GenerateJob, GenerationResults, WorkerReady
from azr_async.ports import Sender

Order = GenerateJob | CancelJob
Connect = Callable[[WorkerReady], Sender[Order]]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class WorkerTotals:
    """What a worker has reported so far, together with those that it replaced."""

    busy_seconds: float = 0.0
    generated_tokens: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Link:
    """The way to one worker."""

    ready: WorkerReady
    outbox: asyncio.Queue[Order]
    feeding: asyncio.Task[None]
    before: WorkerTotals
    """What those that it replaced had reported."""
    is_slow: bool = False
    """It let a job's deadline pass and has sent nothing since."""


class Links:
    """Opens a way to each worker that announces itself, and notices when it is gone."""

    def __init__(
        self, connect: Connect, *, expected_workers: Sequence[str], ready_seconds: float, on_lost: Callable[[str], None]
    ) -> None:
        """`on_lost` is called with the name of a worker that is no longer here."""
        self.open: dict[str, Link] = {}
        self.totals: dict[str, WorkerTotals] = {}
        self.lost = 0
        """How often a worker was lost."""
        self.newest: Mapping[str, int] = {}
        """Name and incarnation of the workers that have the newest weights."""
        self._connect, self._on_lost = connect, on_lost
        self._expected_workers, self._ready_seconds = expected_workers, ready_seconds
        self._patience = asyncio.timeout(None)
        self._is_over = False

    def takes_jobs(self, name: str) -> bool:
        """Is a worker there, up to date and not held up?"""
        link = self.open.get(name)
        return link is not None and not link.is_slow and self.is_current(name)

    def is_current(self, name: str) -> bool:
        """Has a worker the newest weights?"""
        return self.newest.get(name) == self.open[name].ready.incarnation

    def send(self, name: str, order: Order) -> None:
        """Give an order to a worker that is there; it is lost with the worker."""
        self.open[name].outbox.put_nowait(order)

    def patience(self) -> asyncio.Timeout:
        """Runs out when no worker has been there for too long; whoever receives what they send enters it at once."""
        now = asyncio.get_running_loop().time()
        self._patience = asyncio.timeout_at(None if self.open else now + self._ready_seconds)
        return self._patience

    def nobody_there(self) -> str:
        """What to say when it has run out."""
        names = ", ".join(self._expected_workers)
        happening = f"no inference worker was ready after {self._ready_seconds:g} s: {names} did not come up"
        if self.totals:
            happening = f"all of {names} were lost, and none came back within {self._ready_seconds:g} s"
        return f"{happening}. Look at logs/<worker>.log, or raise wires.start_seconds if the model only loads slowly."

    def welcome(self, ready: WorkerReady, tasks: asyncio.TaskGroup) -> None:
        """Open the way to a worker. One of the same name is gone then, even if nobody has noticed yet."""
        name = ready.worker
        if name in self.open:
            self.open[name].feeding.cancel()
            self._lose(name, "it was started again")
        outbox: asyncio.Queue[Order] = asyncio.Queue()
        feeding = tasks.create_task(self._feed(ready, outbox), name=f"jobs for {name}")
        totals = self.totals.setdefault(name, WorkerTotals())
        self.open[name] = Link(ready, outbox, feeding, replace(totals))
        self._patience.reschedule(None)

    def hear(self, results: GenerationResults) -> None:
        """A worker has reported, so it is not held up. One that is no longer here counts no more."""
        link = self.open.get(results.worker)
        if link is not None:
            link.is_slow = False
            before = link.before
            self.totals[results.worker] = WorkerTotals(
                before.busy_seconds + results.busy_seconds,
                before.generated_tokens + results.generated_tokens,
                {name: before.numbers.get(name, 0.0) + number for name, number in results.numbers.items()},
            )

    def close(self) -> None:
        """Nothing more is to be sent."""
        self._is_over = True
        for link in self.open.values():
            link.feeding.cancel()

    async def _feed(self, ready: WorkerReady, outbox: "asyncio.Queue[Order]") -> None:
        """Send a worker what it is to get, until it is gone."""
        try:
            async with self._connect(ready) as orders, asyncio.TaskGroup() as group:
                sending = group.create_task(_send_all(outbox, orders), name=f"orders for {ready.worker}")
                problem = await orders.ended()
                sending.cancel()
        except (PeerVanished, ChannelClosed) as not_reached:
            problem = not_reached
        self._lose(ready.worker, str(problem))

    def _lose(self, name: str, why: str) -> None:
        if self._is_over:
            return
        del self.open[name]
        self.lost += 1
        log.warning("inference worker %s was lost, %d are left: %s", name, len(self.open), why)
        if not self.open:
            self._patience.reschedule(asyncio.get_running_loop().time() + self._ready_seconds)
        self._on_lost(name)


async def _send_all(outbox: "asyncio.Queue[Order]", orders: Sender[Order]) -> None:
    with suppress(PeerVanished, ChannelClosed):  # `ended` tells
        while True:
            await orders.send(await outbox.get())
