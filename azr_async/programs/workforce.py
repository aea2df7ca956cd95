"""More and fewer inference workers while a run goes on."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from azr_async.errors import ConfigError
from azr_async.programs.fates import ProgramSpec
from azr_async.programs.mailbox import WorkersOrder
from azr_async.programs.placement import Placed, worker_index
from azr_async.programs.supervision import Supervisor

Place = Callable[[int, Collection[int]], Awaitable[Placed]]


@dataclass(slots=True)
class Workforce:
    """The inference workers of a run, and where they are."""

    supervisor: Supervisor
    placed: dict[str, Placed]
    """All programs."""
    place: Place
    """Where the worker of this number goes, beside those on these GPUs. Raises ConfigError when there is no room."""
    make: Callable[[Placed], ProgramSpec]
    _ever: int = field(init=False)
    _turn: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._ever = 1 + max(map(worker_index, self._workers()))

    async def carry_out(self, order: WorkersOrder) -> str:
        """What was done, for people. Raises ConfigError, and does nothing, when that cannot be."""
        async with self._turn:  # else two orders could give one number, or one GPU, twice
            return await self._carry_out(order)

    async def _carry_out(self, order: WorkersOrder) -> str:
        if not self.supervisor.is_under_way:
            raise ConfigError("the run is still starting. Ask again once it has taken its first step.")
        here = self._workers()
        add, remove = order.add, list(order.remove)
        if order.total is not None:
            add, remove = max(0, order.total - len(here)), here[order.total :]
        unknown = [name for name in remove if name not in here]
        if unknown:
            raise ConfigError(f"{', '.join(unknown)} cannot be removed: the workers are {', '.join(here)}.")
        if len(here) + add - len(remove) < 1 or len(remove) >= len(here):
            raise ConfigError(
                f"{', '.join(remove)} cannot be removed: nobody would be left to generate. Add a worker first."
            )
        added = await self._new(add)
        for name in remove:
            self.supervisor.remove(name)
        for placed in added:
            self.placed[placed.process] = placed
            self.supervisor.add(self.make(placed))
        return self._told([placed.process for placed in added], remove)

    def _workers(self) -> list[str]:
        """Those that are here to stay, in the order of their numbers."""
        states = self.supervisor.states()
        here = [name for name, placed in self.placed.items() if placed.role == "generates"]
        return sorted(
            (name for name in here if states.get(name, "ended") not in ("leaving", "ended")), key=worker_index
        )

    async def _new(self, count: int) -> list[Placed]:
        """Numbers are not used twice: whoever has heard of a worker that left must not take another one for it."""
        added: list[Placed] = []
        states = self.supervisor.states()
        taken = {gpu for name, placed in self.placed.items() if name in states for gpu in placed.gpus}
        for index in range(self._ever, self._ever + count):
            added.append(await self.place(index, taken))
            taken |= set(added[-1].gpus)
        self._ever += count
        return added

    def _told(self, added: list[str], removed: list[str]) -> str:
        come = f"{_span(added)} will get the newest weights, then jobs." if added else ""
        go = f"{_span(removed)} will leave; what is not finished is made by the others." if removed else ""
        return " ".join(filter(None, [come, go])) or "There is nothing to change."


def _span(names: Sequence[str]) -> str:
    """Few by name, many by the first and the last."""
    return ", ".join(names) if len(names) <= 8 else f"{len(names)} workers, {names[0]} to {names[-1]},"
