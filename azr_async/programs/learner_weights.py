"""Pushing weights from the learner to every inference worker, and proving that they arrived."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from azr_async.adapters.trainer import Trainer
from azr_async.adapters.weights import WeightGroup, host_store
from azr_async.config import Config
from azr_async.errors import WeightsError
from azr_async.messages import JoinWeights, PushWeights, WeightsInstalled, WeightsJoined
from azr_async.programs.learner_metrics import Push
from azr_async.programs.learner_wires import Wires

T = TypeVar("T")

CANARIES: Final = 4
CANARY_TOKENS: Final = 16
STORE_HOST: Final = "127.0.0.1"


class TorchThread:
    """The one thread in which torch works, so that the event loop stays free for heartbeats."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in the thread, after what was asked before."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


@dataclass(frozen=True, kw_only=True, slots=True)
class Publisher:
    """Pushes the trainer's weights; the broadcast group has the learner as rank 0 and then the workers' ranks."""

    config: Config
    trainer: Trainer
    torch: TorchThread
    wires: Wires
    group: WeightGroup
    canary_ids: tuple[NDArray[np.int32], ...]

    async def push(self, version: int) -> Push:
        """Broadcast `version`; returns when every worker samples with it.

        Raises:
            PeerVanished: a worker did not answer in time; it is named.
            WeightsError: a worker received other bytes, or computes other log-probabilities with them.
        """
        started = time.monotonic()
        for sender in self.wires.workers.values():
            await sender.send(PushWeights(version=version, canary_ids=self.canary_ids))
        await self.torch.run(partial(self._send, version))
        expected = await self.torch.run(partial(self.trainer.score, self.canary_ids))
        installed = await self.wires.inbox.from_each(
            WeightsInstalled,
            self.wires.workers,
            deadline_seconds=self.config.weights.deadline_seconds,
            setting="weights.deadline_seconds",
            wanted=lambda answer: answer.version == version,
        )
        return Push(
            push_seconds=time.monotonic() - started,
            pause_seconds=max(answer.pause_seconds for answer in installed.values()),
            canary_max_logp_error=_worst_error(installed, expected, self.config.weights.canary_tolerance),
        )

    def _send(self, version: int) -> str:
        bucket_bytes = self.config.weights.bucket_mb * 2**20
        return self.group.send(self.trainer.named_weights(), version=version, bucket_bytes=bucket_bytes)


@asynccontextmanager
async def publishing(
    config: Config, trainer: Trainer, torch: TorchThread, wires: Wires, *, vocabulary: int
) -> AsyncIterator[Publisher]:
    """Gather the workers into one broadcast group; it is closed on the way out.

    Raises PeerVanished or WeightsError, naming the worker, when one does not join in time.
    """
    deadline_seconds, world_size, number = config.weights.deadline_seconds, 1 + sum(wires.ranks.values()), 0
    store = await torch.run(partial(host_store, STORE_HOST, config.weights.port))
    rank = 1
    for worker, sender in wires.workers.items():
        await sender.send(JoinWeights(host=STORE_HOST, port=store.port, rank=rank, world_size=world_size, group=number))
        rank += wires.ranks[worker]
    group = await torch.run(
        lambda: WeightGroup(
            store,
            group=number,
            rank=0,
            world_size=world_size,
            device=trainer.device,
            deadline_seconds=deadline_seconds,
        )
    )
    try:
        await wires.inbox.from_each(
            WeightsJoined,
            wires.workers,
            deadline_seconds=deadline_seconds,
            setting="weights.deadline_seconds",
            wanted=lambda answer: answer.group == number,
        )
        canary_ids = canaries(vocabulary, config.run.seed)
        yield Publisher(config=config, trainer=trainer, torch=torch, wires=wires, group=group, canary_ids=canary_ids)
    finally:
        await torch.run(group.close)


def canaries(vocabulary: int, seed: int) -> tuple[NDArray[np.int32], ...]:
    """Fixed token sequences whose log-probabilities tell whether two copies of the weights are the same."""
    generator = np.random.default_rng(seed)
    return tuple(generator.integers(0, vocabulary, CANARY_TOKENS, dtype=np.int32) for _ in range(CANARIES))


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
