"""The thread in which an inference worker's engine and weight group live: orders in, answers out."""

import logging
import queue
import time
from collections.abc import Callable

import torch

from azr_async.adapters.engines.embedded import EmbeddedEngine
from azr_async.adapters.models import load_model
from azr_async.adapters.weights import WeightGroup, connect_store
from azr_async.config import Config
from azr_async.errors import WeightsError
from azr_async.messages import (
    GenerateJob,
    GenerationResults,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
)

Order = GenerateJob | JoinWeights | PushWeights
Answer = GenerationResults | WeightsJoined | WeightsInstalled

log = logging.getLogger(__name__)


class EngineThread:
    """What happens in the engine's thread: take orders, step, answer; idle when there is nothing to do."""

    def __init__(
        self, name: str, engine: EmbeddedEngine, config: Config, *, answer: Callable[[Answer], object]
    ) -> None:
        self._name, self._engine, self._config, self._answer = name, engine, config, answer
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._group: WeightGroup | None = None

    def give(self, order: Order) -> None:
        """Queue an order; from any thread."""
        self._orders.put(order)

    def stop(self) -> None:
        """End `run` after the step at hand; from any thread. What is still running is dropped."""
        self._orders.put(None)

    def run(self) -> None:
        """Serve until `stop`. Raises EngineError and WeightsError."""
        try:
            while self._take_orders():
                completions = self._engine.step()
                if completions:
                    self._answer(
                        GenerationResults(
                            worker=self._name,
                            completions=tuple(completions),
                            busy_seconds=self._engine.busy_seconds,
                            generated_tokens=self._engine.generated_tokens,
                        )
                    )
        finally:
            if self._group is not None:
                self._group.close()

    def _take_orders(self) -> bool:
        """Carry out all orders, in order, waiting for one when there is no work. False: it is time to stop."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            match order:
                case GenerateJob():
                    self._engine.submit(order)
                case JoinWeights():
                    self._join(order)
                case PushWeights():
                    self._install(order)
                case None:
                    return False

    def _join(self, order: JoinWeights) -> None:
        if self._group is not None:
            self._group.close()
        deadline_seconds = self._config.weights.deadline_seconds
        self._group = WeightGroup(
            connect_store(order.host, order.port, deadline_seconds),
            group=order.group,
            rank=order.rank,
            world_size=order.world_size,
            device=engine_device(self._config),
            deadline_seconds=deadline_seconds,
        )
        self._answer(WeightsJoined(worker=self._name, group=order.group))

    def _install(self, order: PushWeights) -> None:
        """Receive a version, put it to use, and tell what it says about the canary sequences."""
        if self._group is None:
            raise WeightsError(
                f"version {order.version} was pushed before {self._name} was asked to join a weight group. "
                "The learner has to send JoinWeights first; run the same version of azr_async everywhere."
            )
        began_seconds = time.perf_counter()
        self._engine.begin_update()
        version, digest = self._group.receive(self._engine.install)
        if version != order.version:
            raise WeightsError(
                f"{self._name} was told of version {order.version} but received version {version}. "
                "Resume from the last checkpoint; if it happens again, report it."
            )
        self._engine.finish_update(version)
        canary_logp = self._engine.score(order.canary_ids)
        pause_seconds = time.perf_counter() - began_seconds
        log.info("version %d installed, digest %s, pause %.3f s", version, digest, pause_seconds)
        self._answer(
            WeightsInstalled(
                worker=self._name,
                version=version,
                canary_logp=canary_logp,
                pause_seconds=pause_seconds,
            )
        )


def engine_device(config: Config) -> torch.device:
    """The launcher shows each worker only its own GPU."""
    return torch.device("cuda", 0) if config.placement.inference_gpus else torch.device("cpu")


def load_engine(config: Config) -> EmbeddedEngine:
    """The engine on its device. Raises CheckpointError or EngineError."""
    device = engine_device(config)
    if device.type == "cpu":
        torch.set_num_threads(1)  # of this, the engine's thread; two fight for the cores that others need
    model, tokenizer = load_model(config.model.path, config.model.precision, device)
    return EmbeddedEngine(
        model,
        tokenizer,
        slots=config.engine.slots,
        context_tokens=config.engine.context_tokens,
        on_new_weights=config.engine.on_new_weights,
    )
