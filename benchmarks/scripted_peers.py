"""The real self-play process between scripted inference workers and a scripted learner, for benchmarks.

Real are the self-play program with its sandbox and journal, every socket, every message. Scripted are the neighbours:
a worker sleeps for as long as its tokens take and answers by a rule; the learner sleeps for as long as a step takes.
Weights do not travel: a number in shared memory says which version everybody has. Several workers share a process,
each with sockets of its own, as if it were alone.
"""

import asyncio
import math
import multiprocessing as mp
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import uvloop

from azr_async.adapters.channels import ZmqContext, ZmqReceiver, ZmqSender, shared_context, zmq_receiver, zmq_sender
from azr_async.adapters.engines.gate import Gate
from azr_async.algorithm.staleness import lag_of
from azr_async.config import Config
from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import (
    BatchRequest,
    CancelJob,
    Completion,
    GenerateJob,
    GenerationResults,
    RolloutBatch,
    WeightsReady,
    WorkerReady,
)
from azr_async.programs.folders import config_text
from azr_async.programs.wiring import CONFIG_FILE, LAUNCHER_PID_FILE, endpoint

SPAWN: Final = mp.get_context("spawn")
END_SECONDS: Final = 20.0
"""For a process to end when it has been told to."""
BATCH_SECONDS: Final = 120.0
"""For self-play to start, and for each batch."""
LENGTH_MOST: Final = 4.0
"""No completion is longer than this multiple of the mean."""

Answer = Callable[[GenerateJob, int], str]


@dataclass(frozen=True, kw_only=True)
class Script:
    """How a scripted worker behaves."""

    answer: Answer
    """The text of a job's sample number n; a function of a module, for it goes to other processes."""
    tokens: int
    """Mean length of a completion."""
    spread: float = 0.0
    """Of the logarithm of its length: 0 makes all alike."""
    prompt_tokens: int = 64
    slot_tokens_per_second: float = math.inf
    """Speed of one slot; it does not depend on how many others are busy."""
    pause_seconds: float = 0.0
    """In which no worker samples when a new version arrives."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the scripted learner saw of one step."""

    ended_seconds: float
    """On this host's monotonic clock."""
    waited_seconds: float
    """For the batch."""
    rollouts: int
    tokens: int
    lag_mean: float
    lag_max: int
    stats: dict[str, float]


@contextmanager
def self_play_process(config: Config, run_dir: Path, wires_dir: Path) -> Iterator[psutil.Process]:
    """The self-play program of a run, started as the launcher does; it ends when the learner has closed."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
    (wires_dir / LAUNCHER_PID_FILE).write_text(str(os.getpid()), encoding="ascii")
    command = [sys.executable, "-m", "azr_async.programs.selfplay", "--run-dir", str(run_dir), "--wires"]
    with (
        (run_dir / "logs" / "stderr.log").open("wb") as errors,
        subprocess.Popen([*command, str(wires_dir)], stderr=errors) as process,
    ):
        try:
            yield psutil.Process(process.pid)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        finally:
            process.kill()


@contextmanager
def scripted_workers(
    config: Config, wires_dir: Path, script: Script, version: "Synchronized[int]", *, processes: int
) -> Iterator[None]:
    """All inference workers of the configuration, in so many processes; they end when self-play has closed."""
    hosts = [
        SPAWN.Process(
            target=_host,
            args=(config.model_dump_json(), wires_dir, script, version, range(n, config.inference_workers, processes)),
        )
        for n in range(min(processes, config.inference_workers))
    ]
    for host in hosts:
        host.start()
    try:
        yield
        for host in hosts:
            host.join(END_SECONDS)
    finally:
        for host in hosts:
            host.kill()


async def scripted_learner(
    config: Config,
    wires_dir: Path,
    version: "Synchronized[int]",
    *,
    tokens_per_second: float = math.inf,
    push_seconds: float = 0.0,
    until: Callable[[Sequence[Step]], bool],
) -> list[Step]:
    """Ask, train by sleeping, push by sleeping, in the order of the real learner, until `until` says so."""
    requests: ZmqSender[BatchRequest | WeightsReady] = zmq_sender(
        endpoint(config, wires_dir, "selfplay-requests"),
        name="learner-0",
        peer="selfplay",
        connect_seconds=BATCH_SECONDS,
    )
    workers = {worker_name(index): index for index in range(config.inference_workers)}
    steps: list[Step] = []
    async with _batches(config, wires_dir) as batches, requests:
        await requests.send(WeightsReady(version=0, workers=workers))
        await requests.send(BatchRequest(version=0))
        while not until(steps):
            asked_seconds = time.monotonic()
            async with asyncio.timeout(BATCH_SECONDS):
                batch = await anext(batches)
            waited_seconds = time.monotonic() - asked_seconds
            await requests.send(BatchRequest(version=batch.version + 1))
            tokens = sum(len(rollout.token_ids) - rollout.prompt_length for rollout in batch.rollouts)
            await asyncio.sleep(tokens / tokens_per_second + push_seconds)
            version.value = batch.version + 1
            await requests.send(WeightsReady(version=batch.version + 1, workers=workers))
            steps.append(_step(batch, tokens, waited_seconds))
    return steps


def worker_name(index: int) -> str:
    """As the launcher calls them."""
    return f"inference-{index}"


def compact_answer(job: GenerateJob, index: int) -> str:
    """In the starter's language: additions, and answers that are right now and then."""
    prompt, draw = job.prompt.text, random.Random(f"{job.seed} {index}").randrange(10_000)
    if prompt.startswith("<propose><induction>"):
        return "".join(f"<in>{draw % 90 + step}" for step in range(6)) + "<msg>add"
    if prompt.startswith("<propose>"):
        return f"def f(x):\n    return x + {draw % 100}<in>{draw // 100}"
    return f"def f(x):\n    return x + {draw % 9}" if prompt.startswith("<solve><induction>") else str(draw % 200)


# ---------------------------------------------------------------- workers


def _host(
    config_json: str, wires_dir: Path, script: Script, version: "Synchronized[int]", indices: Sequence[int]
) -> None:
    config = Config.model_validate_json(config_json)

    async def serve_all() -> None:
        async with shared_context() as context, asyncio.TaskGroup() as group:
            for index in indices:
                worker = _Worker(config, index, script, version)
                group.create_task(worker.serve(wires_dir, context), name=worker_name(index))

    uvloop.run(serve_all())


class _Worker:
    """One scripted inference worker."""

    def __init__(self, config: Config, index: int, script: Script, version: "Synchronized[int]") -> None:
        self._config, self._script, self._version = config, script, version
        self._name, self._index = worker_name(index), index
        self._gate = Gate(config.engine.slots)
        self._busy_seconds, self._tokens = 0.0, 0
        self._prompt_ids = np.arange(script.prompt_tokens, dtype=np.int32)

    async def serve(self, wires_dir: Path, context: ZmqContext) -> None:
        """Take jobs until self-play has closed. `context` is that of all workers of this process."""
        jobs: ZmqReceiver[GenerateJob | CancelJob] = zmq_receiver(
            endpoint(self._config, wires_dir, f"{self._name}-jobs"),
            (GenerateJob, CancelJob),
            name=f"{self._name}-jobs",
            capacity=256,
            peer_timeout_seconds=self._config.wires.peer_timeout_seconds,
        )
        results: ZmqSender[GenerationResults | WorkerReady] = zmq_sender(
            endpoint(self._config, wires_dir, "selfplay-results"),
            name=self._name,
            peer="selfplay",
            peer_timeout_seconds=self._config.wires.peer_timeout_seconds,
            connect_seconds=BATCH_SECONDS,
            context=context,
        )
        slots, sampling = self._config.engine.slots, set[asyncio.Task[None]]()
        async with jobs, results, asyncio.TaskGroup() as group:
            await results.send(
                WorkerReady(worker=self._name, endpoint=jobs.endpoint, slots=slots, incarnation=self._index)
            )
            async for order in jobs:
                if isinstance(order, GenerateJob):
                    for index in order.wanted:
                        task = group.create_task(self._sample(order, index, results))
                        sampling.add(task)
                        task.add_done_callback(sampling.discard)
            for task in sampling:
                task.cancel()

    async def _sample(self, job: GenerateJob, index: int, results: ZmqSender[GenerationResults | WorkerReady]) -> None:
        script = self._script
        tokens = _length(script, f"{job.seed} {index}")
        async with self._gate.admitted(job.priority, job.job_id):
            version = self._version.value
            seconds = tokens / script.slot_tokens_per_second
            if seconds:
                await asyncio.sleep(seconds)
                await asyncio.sleep((self._version.value - version) * script.pause_seconds)
        self._busy_seconds += seconds / self._config.engine.slots
        self._tokens += tokens
        made, busy_seconds = (self._completion(job, index, tokens, version),), self._busy_seconds
        with suppress(ChannelClosed, PeerVanished):  # the run is over
            await results.send(
                GenerationResults(
                    worker=self._name, completions=made, busy_seconds=busy_seconds, generated_tokens=self._tokens
                )
            )

    def _completion(self, job: GenerateJob, index: int, tokens: int, version: int) -> Completion:
        token_ids = np.arange(tokens, dtype=np.int32)
        return Completion(
            job_id=job.job_id,
            index=index,
            finish="stop",
            text=self._script.answer(job, index),
            prompt_ids=self._prompt_ids,
            token_ids=token_ids,
            behavior_logp=(token_ids % 8).astype(np.float32) / -8.0,
            token_version=np.full(tokens, version, np.int32),
        )


def _length(script: Script, seed: str) -> int:
    if not script.spread:
        return script.tokens
    draw = random.Random(seed).lognormvariate(-0.5 * script.spread**2, script.spread)
    return max(1, round(script.tokens * min(draw, LENGTH_MOST)))


# ---------------------------------------------------------------- learner


def _batches(config: Config, wires_dir: Path) -> ZmqReceiver[RolloutBatch]:
    return zmq_receiver(
        endpoint(config, wires_dir, "learner-batches"),
        (RolloutBatch,),
        name="learner-batches",
        capacity=16,
        limit_bytes=config.wires.message_mb * 2**20,
    )


def _step(batch: RolloutBatch, tokens: int, waited_seconds: float) -> Step:
    lags = [lag_of(rollout, batch.version) for rollout in batch.rollouts]
    return Step(
        ended_seconds=time.monotonic(),
        waited_seconds=waited_seconds,
        rollouts=len(lags),
        tokens=tokens,
        lag_mean=sum(lags) / len(lags),
        lag_max=max(lags),
        stats=dict(batch.stats),
    )
