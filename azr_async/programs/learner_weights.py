"""Pushing weights from the learner to the inference workers that are there, and proving that they arrived."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import device as torch_device
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from azr_async.adapters.trainer import Crew
from azr_async.adapters.weights import Sent, WeightGroup, give_up, host_store
from azr_async.config import Config
from azr_async.errors import ChannelClosed, PeerVanished, RanksLost, WeightsError
from azr_async.messages import JoinWeights, PushWeights, WeightsInstalled, WeightsJoined
from azr_async.programs.learner_metrics import Push
from azr_async.programs.learner_roster import Member
from azr_async.programs.learner_wires import FromWorker, Wires
from azr_async.programs.torch_thread import TorchThread

CANARIES: Final = 4
CANARY_TOKENS: Final = 16
STORE_HOST: Final = "127.0.0.1"
NAMELESS_FAILURES: Final = 2
"""How often a push is repeated of which nobody knows why it failed."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """A broadcast group: the learner as rank 0, then the workers' ranks in the order of `members`."""

    transport: WeightGroup
    number: int
    members: tuple[Member, ...]


class Publisher:
    """Pushes the trainer's weights to every worker that can be reached, whoever that is by now."""

    def __init__(
        self, config: Config, trainer: Crew, torch: TorchThread, wires: Wires, store: TCPStore, *, vocabulary: int
    ) -> None:
        """`store` is where the ranks of a group find each other; a group is built with the first push."""
        self.installed: dict[str, int] = {}
        """Name and incarnation of the workers that sample with the newest weights."""
        self._config, self._trainer, self._torch = config, trainer, torch
        self._inbox, self._roster, self._store = wires.inbox, wires.roster, store
        self._canary_ids = canaries(vocabulary, config.run.seed)
        self._group: _Group | None = None
        self._groups_built = self._groups_given_up = 0

    @property
    def has_newcomers(self) -> bool:
        """Is there a worker without the newest weights?"""
        return any(self.installed.get(one.name) != one.incarnation for one in self._roster.members.values())

    @property
    def has_installed(self) -> bool:
        """Is there still a worker with the newest weights?"""
        return any(self.installed.get(one.name) == one.incarnation for one in self._roster.members.values())

    async def push(self, version: int) -> Push:
        """Broadcast `version`; returns when every worker that can be reached samples with it.

        A worker that is lost on the way, or does not answer in time, is named in the log and left out; the others get
        the push again. Without any it waits for one to come back, unless a stop is requested.

        Raises:
            PeerVanished: no worker came back in time.
            WeightsError: a worker received other bytes, or computes other log-probabilities with them.
        """
        started, answers, nameless_failures = time.monotonic(), dict[str, WeightsInstalled](), 0
        while not answers:
            members = await self._reachable()
            if not members:
                self.installed = {}
                return Push()
            try:
                sent, answers = await self._push_to(members, version)
            except RanksLost as broken:
                lost = _owners(broken.ranks, members)
                nameless_failures += not lost
                if nameless_failures > NAMELESS_FAILURES:
                    raise
                log.warning("version %d is pushed again: %s", version, broken)
                self._give_up(lost, str(broken))
                await self.close()
        expected = await self._torch.run(partial(self._trainer.score, self._canary_ids))
        error = _worst_error(answers, expected, self._config.weights.canary_tolerance)
        self.installed = {one.name: one.incarnation for one in members if one.name in answers}
        return Push(
            push_seconds=time.monotonic() - started,
            transfer_seconds=sent.seconds,
            megabytes=sent.size_bytes / 1e6,
            pause_seconds=max(answer.pause_seconds for answer in answers.values()),
            canary_max_logp_error=error,
        )

    async def close(self) -> None:
        """Leave the group, even if it is not complete; whoever waits in it is told."""
        leave = partial(
            self._torch.run,
            what="leaving the weight group",
            deadline_seconds=self._config.weights.deadline_seconds,
        )
        if self._group is not None:
            await leave(self._group.transport.close)
            self._group = None
        if self._groups_given_up < self._groups_built:
            await leave(partial(give_up, self._store, self._groups_built - 1))
            self._groups_given_up = self._groups_built

    async def _reachable(self) -> tuple[Member, ...]:
        """Everybody who is there, waiting for somebody if need be; nobody when a stop is requested."""

        def there() -> tuple[Member, ...] | None:
            members = tuple(sorted(self._roster.members.values(), key=lambda one: one.name))
            return members if members or self._inbox.is_stopping else None

        seconds = self._config.wires.start_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._inbox.until(there)
        except TimeoutError:
            raise PeerVanished(
                f"every inference worker was lost, and none came back within {seconds:g} s. Look at the end of "
                "logs/inference-*.log; raise wires.start_seconds if a start takes longer. --resume goes on."
            ) from None

    async def _push_to(self, members: tuple[Member, ...], version: int) -> tuple[Sent, dict[str, WeightsInstalled]]:
        """What was sent, and the answers of those that installed it. Raises RanksLost when a rank is lost."""
        if self._group is None or self._group.members != members:
            await self.close()
            self._group = await self._built(members)
        number = self._group.number
        for rank, member in _ranks(members):
            await _order(member, rank, PushWeights(version=version, canary_ids=self._canary_ids, group=number))
        sent = await self._torch.run(partial(self._send, self._group.transport, version))
        answers = await self._answers(
            # An attempt before this one may have been answered as well.
            WeightsInstalled,
            members,
            lambda answer: answer.version == version and answer.group == number,
        )
        return sent, answers

    async def _built(self, members: tuple[Member, ...]) -> _Group:
        number, self._groups_built = self._groups_built, self._groups_built + 1
        world_size, port = 1 + sum(member.ranks for member in members), self._store.port
        for rank, member in _ranks(members):
            order = JoinWeights(host=STORE_HOST, port=port, rank=rank, world_size=world_size, group=number)
            await _order(member, rank, order)
        transport = await self._torch.run(
            lambda: WeightGroup(
                self._store,
                group=number,
                rank=0,
                world_size=world_size,
                device=torch_device(self._config.weights_device),
                deadline_seconds=self._config.weights.deadline_seconds,
                known_lost=lambda: [rank for rank, one in _ranks(members) if not self._roster.has(one)],
            )
        )
        joined = await self._answers(WeightsJoined, members, lambda answer: answer.group == number)
        if len(joined) < len(members):
            await self._torch.run(transport.close)
            raise RanksLost(f"weight group {number} was only joined by {', '.join(joined) or 'nobody'}")
        return _Group(transport=transport, number=number, members=members)

    async def _answers(
        self, kind: type[FromWorker], members: tuple[Member, ...], wanted: Callable[[FromWorker], bool]
    ) -> dict[str, FromWorker]:
        """What the members say until the deadline; who says nothing is given up."""
        seconds = self._config.weights.deadline_seconds

        def there() -> list[str]:
            return [one.name for one in members if self._roster.has(one)]

        answers = await self._inbox.from_each(kind, there, deadline_seconds=seconds, wanted=wanted)
        why = f"no {kind.__name__} came within weights.deadline_seconds = {seconds:g} s."
        self._give_up([one for one in members if one.name not in answers], why)
        return {name: answer for name, answer in answers.items() if name in there()}

    def _give_up(self, members: Collection[Member], why: str) -> None:
        for one in members:
            self._roster.give_up(one, f"{why} Look at logs/{one.name}.log.")

    def _send(self, transport: WeightGroup, version: int) -> Sent:
        bucket_bytes = self._config.weights.bucket_mb * 2**20
        tensors = self._trainer.named_weights()
        try:
            return transport.send(tensors, version=version, bucket_bytes=bucket_bytes)
        finally:
            for _ in tensors:
                pass  # putting sharded weights together is the work of all ranks: none may stop half way


@asynccontextmanager
async def publishing(
    config: Config, trainer: Crew, torch: TorchThread, wires: Wires, *, vocabulary: int
) -> AsyncIterator[Publisher]:
    """A publisher; its broadcast group is closed on the way out. Raises ConfigError when its port is in use."""
    store = await torch.run(partial(host_store, STORE_HOST, config.weights.port))
    publisher = Publisher(config, trainer, torch, wires, store, vocabulary=vocabulary)
    try:
        yield publisher
    finally:
        await publisher.close()


def canaries(vocabulary: int, seed: int) -> tuple[NDArray[np.int32], ...]:
    """Fixed token sequences whose log-probabilities tell whether two copies of the weights are the same."""
    generator = np.random.default_rng(seed)
    return tuple(generator.integers(0, vocabulary, CANARY_TOKENS, dtype=np.int32) for _ in range(CANARIES))


def _ranks(members: Sequence[Member]) -> Iterator[tuple[int, Member]]:
    """The first rank of each member."""
    rank = 1
    for member in members:
        yield rank, member
        rank += member.ranks


def _owners(ranks: Collection[int], members: Sequence[Member]) -> list[Member]:
    """Whose ranks these are."""
    return [one for first, one in _ranks(members) if any(first <= rank < first + one.ranks for rank in ranks)]


async def _order(member: Member, rank: int, order: PushWeights | JoinWeights) -> None:
    try:
        await member.orders.send(order)
    except (PeerVanished, ChannelClosed) as gone:
        raise RanksLost(str(gone), [rank]) from gone


def _worst_error(installed: Mapping[str, WeightsInstalled], expected: NDArray[np.float32], tolerance: float) -> float:
    worst = 0.0
    for worker, answer in installed.items():
        if answer.canary_logp.shape != expected.shape:
            raise WeightsError(
                f"{worker} scored {len(answer.canary_logp)} canary tokens, the learner {len(expected)}. "
                "Check that both run the same version of azr_async."
            )
        error = float(np.abs(answer.canary_logp - expected).max())
        if not error <= tolerance:
            raise WeightsError(
                f"{worker} and the learner disagree by {error:.3g} nats on the canary sequences at version "
                f"{answer.version}, more than weights.canary_tolerance = {tolerance:g}: the engine does not compute "
                "what is trained. With model.precision = bfloat16 raise the tolerance; in float32 report it."
            )
        worst = max(worst, error)
    return worst
