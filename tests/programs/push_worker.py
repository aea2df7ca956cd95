"""An inference worker as far as the learner sees it, in a process of its own, and how it fails."""

import asyncio
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.adapters.weights import WeightGroup, connect_store
from azr_async.config import Config
from azr_async.errors import RanksLost
from azr_async.messages import GivenUp, JoinWeights, PushWeights, WeightsInstalled, WeightsJoined, WorkerReady
from azr_async.programs.wiring import endpoint
from tests.random_models import random_model

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.programs.push_worker"])
WIDTH = 8192
"""Of the model's inner layers: it is 10 MB, which are several buckets."""


@dataclass(frozen=True)
class Fault:
    """What happens to a worker in the middle of the push of a version, or when it is to join a group."""

    version: int | Literal["join"]
    signal: signal.Signals


@contextmanager
def push_worker(name: str, config: Config, wires_dir: Path, fault: Fault | None = None) -> Iterator[BaseProcess]:
    """Each version that it has installed is a line of `<name>.installed` beside the wires."""
    process = FORKS.Process(target=_main, args=(name, config.model_dump_json(), wires_dir, fault))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def installed_by(name: str, wires_dir: Path) -> list[int]:
    """The versions that the workers of this name have installed."""
    return [int(line) for line in (wires_dir.parent / f"{name}.installed").read_text().splitlines()]


def _main(name: str, config: str, wires_dir: Path, fault: Fault | None) -> None:
    torch.set_num_threads(1)
    asyncio.run(_serve(name, Config.model_validate_json(config), wires_dir, fault))


async def _serve(name: str, config: Config, wires_dir: Path, fault: Fault | None) -> None:
    model = random_model("qwen2-tied", seed=77, intermediate_size=WIDTH)
    scorer = Trainer(model, Config(), connect_ranks(Config()))
    orders: ZmqReceiver[JoinWeights | PushWeights | GivenUp] = zmq_receiver(
        endpoint(config, wires_dir, f"{name}-push"),
        (JoinWeights, PushWeights, GivenUp),
        name=f"{name}-push",
        capacity=8,
    )
    learner: ZmqSender[WorkerReady | WeightsJoined | WeightsInstalled] = zmq_sender(
        endpoint(config, wires_dir, "learner-weights"), name=name, peer="learner-0"
    )
    group: WeightGroup | None = None
    async with orders, learner:
        await learner.send(WorkerReady(worker=name, endpoint="", slots=4, incarnation=os.getpid()))
        async for order in orders:
            if isinstance(order, GivenUp):
                return
            try:
                if isinstance(order, JoinWeights):
                    if fault is not None and fault.version == "join":
                        os.kill(os.getpid(), fault.signal)
                    group = await asyncio.to_thread(_joined, order, config.weights.deadline_seconds)
                    await learner.send(WeightsJoined(worker=name, group=order.group))
                    continue
                assert group is not None
                fails = fault if fault is not None and fault.version == order.version else None
                await asyncio.to_thread(_receive, group, model, fails)
            except RanksLost:
                continue
            (wires_dir.parent / f"{name}.installed").open("a").write(f"{order.version}\n")
            canary_logp = scorer.score(order.canary_ids)
            await learner.send(
                WeightsInstalled(
                    worker=name, version=order.version, canary_logp=canary_logp, pause_seconds=0.0, group=order.group
                )
            )


def _joined(order: JoinWeights, deadline_seconds: float) -> WeightGroup:
    return WeightGroup(
        connect_store(order.host, order.port, deadline_seconds),
        group=order.group,
        rank=order.rank,
        world_size=order.world_size,
        device=torch.device("cpu"),
        deadline_seconds=deadline_seconds,
    )


def _receive(group: WeightGroup, model: torch.nn.Module, fault: Fault | None) -> None:
    def install(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            model.get_parameter(name).data.copy_(tensor)
        if fault is not None:
            os.kill(os.getpid(), fault.signal)

    group.receive(install)
