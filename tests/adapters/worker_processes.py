"""Inference workers as far as their channels go, each in a process of its own, for tests that kill them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.adapters.engine_client import ScriptedEngine
from azr_async.messages import CancelJob, GenerateJob, GenerationResults, WorkerReady

BEAT_SECONDS = 0.05
TIMEOUT_SECONDS = 1.0
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.adapters.worker_processes"])


def text_of(job: GenerateJob, index: int) -> str:
    """What every worker answers."""
    return f"{job.prompt.text}, answer {index}"


@contextmanager
def worker_process(name: str, folder: Path, *, answers_per_job: int, incarnation: int = 0) -> Iterator[BaseProcess]:
    """A worker that gives the first so many answers of each job, and keeps the others to itself."""
    process = FORKS.Process(target=_main, args=(name, folder, answers_per_job, incarnation))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def _main(name: str, folder: Path, answers_per_job: int, incarnation: int) -> None:
    asyncio.run(_serve(name, folder, answers_per_job, incarnation))


async def _serve(name: str, folder: Path, answers_per_job: int, incarnation: int) -> None:
    scripted = ScriptedEngine(text_of)
    orders: ZmqReceiver[GenerateJob | CancelJob] = zmq_receiver(
        f"ipc://{folder}/{name}", (GenerateJob, CancelJob), name=name, capacity=64, heartbeat_seconds=BEAT_SECONDS
    )
    answers: ZmqSender[WorkerReady | GenerationResults] = zmq_sender(
        f"ipc://{folder}/answers", name=name, peer="selfplay", heartbeat_seconds=BEAT_SECONDS
    )
    async with orders, answers:
        await answers.send(WorkerReady(worker=name, endpoint=orders.endpoint, slots=8, incarnation=incarnation))
        async for order in orders:
            if isinstance(order, GenerateJob):
                made = [completion async for completion in scripted.generate(order)][:answers_per_job]
                await answers.send(
                    GenerationResults(
                        worker=name, completions=tuple(made), busy_seconds=0.0, generated_tokens=len(made)
                    )
                )
