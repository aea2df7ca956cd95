"""The embedded engine as a worker serves it: it computes in one thread, weights arrive in another."""

import asyncio
import logging
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import torch
from torch import Tensor

from azr_async.adapters.engines.embedded import EmbeddedEngine
from azr_async.adapters.models import load_model
from azr_async.adapters.weights import WeightGroup, connect_store
from azr_async.config import Config
from azr_async.errors import RanksLost, WeightsError
from azr_async.messages import (
    CancelJob,
    GenerateJob,
    GenerationResults,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
)

Order = GenerateJob | CancelJob | JoinWeights | PushWeights
Answer = GenerationResults | WeightsJoined | WeightsInstalled

log = logging.getLogger(__name__)


@asynccontextmanager
async def embedded_server(config: Config, name: str) -> AsyncIterator["EngineThread"]:
    """The engine with its model loaded. Raises CheckpointError or EngineError."""
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as computing, ThreadPoolExecutor(1) as receiving:
        engine = await asyncio.get_running_loop().run_in_executor(computing, partial(load_engine, config))
        yield EngineThread(name, engine, config, computing=computing, receiving=receiving)


class EngineThread:
    """Steps the engine; between two steps it does what was asked for.

    Through the host's memory weights are received in a thread of their own, next to the steps, and put into place
    between two of them. Between GPUs, where a second copy would be too much, they are received in place, and sampling
    waits. When another rank is lost on the way, the group is: this worker waits for the next one.
    """

    def __init__(
        self, name: str, engine: EmbeddedEngine, config: Config, *, computing: Executor, receiving: Executor
    ) -> None:
        self.ranks = 1
        self._name, self._engine, self._config = name, engine, config
        self._computing, self._receiving = computing, receiving
        self._weights_device = torch.device(config.weights_device)
        self._deeds: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._group: WeightGroup | None = None
        self._is_whole = True  # False while some weights are new and some old: nothing may be sampled with them
        self._answer: Callable[[Answer], object] = log.info

    def give(self, order: Order) -> None:
        """Have an order carried out; from any thread."""
        match order:
            case GenerateJob():
                self._deeds.put(partial(self._engine.submit, order))
            case CancelJob():
                self._deeds.put(partial(self._engine.cancel, order.job_id))
            case JoinWeights():
                self._about_weights(partial(self._join, order))
            case PushWeights():
                self._about_weights(partial(self._receive, order))

    def stop(self) -> None:
        """End `run` after the step at hand; from any thread. What is still running is dropped."""
        self._deeds.put(None)

    async def run(self, answer: Callable[[Answer], object]) -> None:
        """Serve until `stop`; a cancellation waits until the thread has stopped. Raises EngineError, WeightsError."""
        loop = asyncio.get_running_loop()
        self._answer = lambda message: loop.call_soon_threadsafe(answer, message)
        work = loop.run_in_executor(self._computing, self._serve)
        try:
            await asyncio.shield(work)
        finally:
            self.stop()
            await asyncio.wait([work])

    def _serve(self) -> None:
        try:
            while self._do_what_was_asked():
                completions = self._engine.step()
                if completions:
                    self._answer(
                        GenerationResults(
                            worker=self._name,
                            completions=tuple(completions),
                            busy_seconds=self._engine.busy_seconds,
                            generated_tokens=self._engine.generated_tokens,
                            numbers=self._engine.pace.numbers() | {"cpu_seconds": time.process_time()},
                        )
                    )
        finally:
            if self._group is not None:
                self._group.close()

    def _do_what_was_asked(self) -> bool:
        """Everything, in order, waiting for it when there is no other work. False: it is time to stop."""
        while True:
            try:
                deed = self._deeds.get(block=not self._engine.has_work or not self._is_whole)
            except queue.Empty:
                return True
            if deed is None:
                return False
            deed()

    def _about_weights(self, deed: Callable[[], object]) -> None:
        if self._weights_device.type == "cuda":
            self._deeds.put(partial(_or_wait, deed))
        else:
            self._receiving.submit(self._or_fail, deed)

    def _or_fail(self, deed: Callable[[], object]) -> None:
        """Errors of the other thread end the engine's."""
        try:
            _or_wait(deed)
        except Exception as error:
            self._deeds.put(partial(_raise, error))

    def _join(self, order: JoinWeights) -> None:
        if self._group is not None:
            self._group.close()
        deadline_seconds = self._config.weights.deadline_seconds
        self._group = WeightGroup(
            connect_store(order.host, order.port, deadline_seconds),
            group=order.group,
            rank=order.rank,
            world_size=order.world_size,
            device=self._weights_device,
            deadline_seconds=deadline_seconds,
        )
        self._answer(WeightsJoined(worker=self._name, group=order.group))

    def _receive(self, order: PushWeights) -> None:
        """Take part in the broadcast of a version, and put it to use."""
        if self._group is None:
            raise WeightsError(
                f"version {order.version} was pushed before {self._name} was asked to join a weight group. "
                "The learner has to send JoinWeights first; run the same version of azr_async everywhere."
            )
        began_seconds, began_clock = time.perf_counter(), self._engine.clock_seconds()
        if self._weights_device.type == "cuda":
            self._is_whole = False
            self._engine.begin_update()
            self._check_version(order, self._group.receive(self._engine.install)[0])
            self._use(order, began_seconds)
            self._engine.pace.installed(self._engine.clock_seconds() - began_clock)
            self._is_whole = True
        else:
            tensors: list[tuple[str, Tensor]] = []
            self._check_version(order, self._group.receive(tensors.extend)[0])
            cost_seconds = self._engine.clock_seconds() - began_clock  # of this thread
            self._deeds.put(partial(self._install, order, tensors, cost_seconds))

    def _check_version(self, order: PushWeights, version: int) -> None:
        if version != order.version:
            raise WeightsError(
                f"{self._name} was told of version {order.version} but received version {version}. "
                "Resume from the last checkpoint; if it happens again, report it."
            )

    def _install(self, order: PushWeights, tensors: Iterable[tuple[str, Tensor]], received_seconds: float) -> None:
        began_seconds, began_clock = time.perf_counter(), self._engine.clock_seconds()
        self._engine.begin_update()
        self._engine.install(tensors)
        self._use(order, began_seconds)
        self._engine.pace.installed(received_seconds + self._engine.clock_seconds() - began_clock)

    def _use(self, order: PushWeights, began_seconds: float) -> None:
        """Sample with the installed weights from now on, and tell what they say about the canary sequences."""
        self._engine.finish_update(order.version)
        canary_logp = self._engine.score(order.canary_ids)
        pause_seconds = time.perf_counter() - began_seconds
        log.info("version %d installed, pause %.3f s", order.version, pause_seconds)
        self._answer(
            WeightsInstalled(
                worker=self._name,
                version=order.version,
                canary_logp=canary_logp,
                pause_seconds=pause_seconds,
                group=order.group,
            )
        )


def _or_wait(deed: Callable[[], object]) -> None:
    try:
        deed()
    except RanksLost as lost:
        log.warning("waiting for the next weight group: %s", lost, exc_info=lost)


def _raise(error: Exception) -> None:
    raise error


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
