"""vLLM as a worker serves it: every sample a task of the event loop, weights and jobs side by side."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from azr_async.adapters.models import model_source
from azr_async.adapters.weights.vllm_plugin import BACKEND, EXTENSION
from azr_async.algorithm.jobs import engine_seed
from azr_async.config import Config
from azr_async.errors import EngineError, RanksLost, WeightsError
from azr_async.messages import (
    CancelJob,
    Completion,
    GenerateJob,
    GenerationResults,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
)
from azr_async.programs.engine_thread import Answer, Order

if TYPE_CHECKING:
    from azr_async.adapters.engines.vllm import VllmEngine

log = logging.getLogger(__name__)


@asynccontextmanager
async def vllm_server(config: Config, name: str) -> AsyncIterator["VllmServer"]:
    """vLLM with its model loaded; its processes end with the block. Raises EngineError, CheckpointError."""
    # vLLM's processes end with the thread that starts them, so it is kept until they have.
    with ThreadPoolExecutor(1, thread_name_prefix="vllm") as executor:
        engine = await asyncio.get_running_loop().run_in_executor(executor, partial(_open, config, name))
        try:
            yield VllmServer(name, engine, ranks=config.placement.tensor_parallel)
        finally:
            engine.close()


class VllmServer:
    """Carries out orders as they come; weights are taken over one push at a time."""

    def __init__(self, name: str, engine: "VllmEngine", *, ranks: int) -> None:
        self.ranks = ranks
        self._name, self._engine = name, engine
        self._orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self._ended: asyncio.Queue[Completion] = asyncio.Queue()
        self._samples: defaultdict[int, set[asyncio.Task[None]]] = defaultdict(set)

    def give(self, order: Order) -> None:
        """Queue an order."""
        self._orders.put_nowait(order)

    def stop(self) -> None:
        """End `run`; what is still running is aborted."""
        self._orders.put_nowait(None)

    async def run(self, answer: Callable[[Answer], object]) -> None:
        """Serve until `stop`. Raises, in a group, EngineError and WeightsError, with several ranks RanksLost as the
        latter."""
        pushes: asyncio.Queue[JoinWeights | PushWeights] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(self._send_completions(answer), name="completions"),
                group.create_task(self._take_weights(pushes, answer), name="weights"),
            ]
            while (order := await self._orders.get()) is not None:
                match order:
                    case GenerateJob():
                        self._start(order, group)
                    case CancelJob():
                        for task in self._samples.get(order.job_id, ()):
                            task.cancel()
                    case JoinWeights() | PushWeights():
                        pushes.put_nowait(order)
            for task in [*background, *(task for tasks in self._samples.values() for task in tasks)]:
                task.cancel()

    def _start(self, job: GenerateJob, group: asyncio.TaskGroup) -> None:
        refused = self._engine.refused(job)
        for completion in refused:
            self._ended.put_nowait(completion)
        for index in job.wanted if not refused else ():
            task = group.create_task(self._sample(job, index), name=f"job {job.job_id}, sample {index}")
            self._samples[job.job_id].add(task)
            task.add_done_callback(partial(self._forget, job.job_id))

    async def _sample(self, job: GenerateJob, index: int) -> None:
        self._ended.put_nowait(await self._engine.sample(job, index))

    def _forget(self, job_id: int, task: asyncio.Task[None]) -> None:
        self._samples[job_id].discard(task)
        if not self._samples[job_id]:
            del self._samples[job_id]

    async def _send_completions(self, answer: Callable[[Answer], object]) -> None:
        """What has ended by the time that somebody looks travels together."""
        while True:
            completions = [await self._ended.get()]
            while not self._ended.empty():
                completions.append(self._ended.get_nowait())
            answer(
                GenerationResults(
                    worker=self._name,
                    completions=tuple(completions),
                    busy_seconds=self._engine.busy_seconds,
                    generated_tokens=self._engine.generated_tokens,
                )
            )

    async def _take_weights(
        self, orders: asyncio.Queue[JoinWeights | PushWeights], answer: Callable[[Answer], object]
    ) -> None:
        while True:
            order = await orders.get()
            try:
                answer(await (self._join(order) if isinstance(order, JoinWeights) else self._install(order)))
            except RanksLost as lost:
                if self.ranks > 1:
                    # vLLM raises what the first of its ranks says, and takes the words of the others for answers to
                    # whatever it asks next.
                    raise WeightsError(f"{lost} With several ranks vLLM has to start again after that.") from lost
                log.warning("waiting for the next weight group: %s", lost, exc_info=lost)

    async def _join(self, order: JoinWeights) -> Answer:
        await self._engine.join(order)
        return WeightsJoined(worker=self._name, group=order.group)

    async def _install(self, order: PushWeights) -> Answer:
        pause_seconds = await self._engine.update(order.version)
        canary_logp = await self._engine.score(order.canary_ids)
        log.info("version %d installed, pause %.3f s", order.version, pause_seconds)
        return WeightsInstalled(
            worker=self._name,
            version=order.version,
            canary_logp=canary_logp,
            pause_seconds=pause_seconds,
            group=order.group,
        )


def _open(config: Config, name: str) -> "VllmEngine":
    try:
        from azr_async.adapters.engines.vllm.opening import open_engine  # vllm is optional, and slow to import
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise EngineError(
            f"vLLM cannot be imported: {error}. Install it as README.md says; on a CPU `pip uninstall torchvision "
            "torchaudio torchcodec`, which were not built for this torch. Or use --engine transformers."
        ) from error
    source, seed = model_source(config.model.path), engine_seed(config.run.seed, name)
    return open_engine(source, config, transfer_backend=BACKEND, worker_extension=EXTENSION, seed=seed)
