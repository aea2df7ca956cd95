"""Workers are killed, stopped, started again: no sample is lost, and none is delivered twice. Real processes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.adapters.engine_client import RemoteEngines
from azr_async.messages import CancelJob, Completion, GenerateJob, GenerationResults, Prompt, WorkerReady
from tests.adapters.worker_processes import BEAT_SECONDS, TIMEOUT_SECONDS, text_of, worker_process

JOBS, SAMPLES = 12, 3


def job(job_id: int) -> GenerateJob:
    return GenerateJob(
        job_id=job_id,
        prompt=Prompt(text=f"prompt {job_id}"),
        samples=SAMPLES,
        priority=0,
        temperature=1.0,
        top_p=1.0,
        max_tokens=100,
        seed=0,
    )


class SelfPlay:
    """Remote engines over real channels, and who has come so far."""

    def __init__(self, folder: Path) -> None:
        self.answers: ZmqReceiver[WorkerReady | GenerationResults] = zmq_receiver(
            f"ipc://{folder}/answers",
            (WorkerReady, GenerationResults),
            name="answers",
            capacity=64,
            expected_senders=100,
            heartbeat_seconds=BEAT_SECONDS,
            peer_timeout_seconds=TIMEOUT_SECONDS,
        )
        self.ready: dict[str, int] = {}
        self.engines = RemoteEngines(
            self.answers, self.connect, expected_workers=["a", "b"], ready_seconds=20.0, job_seconds=20.0
        )
        self._news = asyncio.Event()

    def connect(self, ready: WorkerReady) -> ZmqSender[GenerateJob | CancelJob]:
        self.ready[ready.worker] = ready.incarnation
        self._news.set()
        return zmq_sender(
            ready.endpoint,
            name="selfplay",
            peer=ready.worker,
            heartbeat_seconds=BEAT_SECONDS,
            peer_timeout_seconds=TIMEOUT_SECONDS,
        )

    async def until_ready(self, **workers: int) -> None:
        """Wait for these workers, then name them as those with the newest weights."""
        while not workers.items() <= self.ready.items():
            self._news.clear()
            await self._news.wait()
        self.engines.installed(workers)

    async def collect(self, job_id: int, first_came: asyncio.Event | None = None) -> list[Completion]:
        completions = []
        async for completion in self.engines.generate(job(job_id)):
            completions.append(completion)
            if first_came is not None:
                first_came.set()
        return completions


@asynccontextmanager
async def self_play(folder: Path) -> AsyncIterator[tuple[SelfPlay, asyncio.TaskGroup]]:
    here = SelfPlay(folder)
    async with here.answers, asyncio.TaskGroup() as tasks:
        tasks.create_task(here.engines.run())
        async with asyncio.TaskGroup() as jobs:
            yield here, jobs
        here.engines.stop()


def assert_each_once(completions: list[list[Completion]]) -> None:
    for job_id, made in enumerate(completions):
        assert sorted(one.index for one in made) == list(range(SAMPLES))
        assert {one.text for one in made} == {text_of(job(job_id), index) for index in range(SAMPLES)}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_what_a_lost_worker_had_is_made_by_the_other_one(tmp_path: Path, how: signal.Signals) -> None:
    with ExitStack() as processes:
        lazy = processes.enter_context(worker_process("a", tmp_path, answers_per_job=1))
        processes.enter_context(worker_process("b", tmp_path, answers_per_job=SAMPLES))
        async with self_play(tmp_path) as (here, tasks):
            await here.until_ready(a=0, b=0)
            first_came = asyncio.Event()
            running = [tasks.create_task(here.collect(job_id, first_came)) for job_id in range(JOBS)]
            await first_came.wait()
            assert lazy.pid is not None
            os.kill(lazy.pid, how)
            assert_each_once([await task for task in running])
            numbers = here.engines.numbers()
            assert (numbers["workers"], numbers["lost_workers"]) == (1, 1)
            assert numbers["reissued"] > 0


async def test_a_worker_that_was_started_again_takes_the_place_of_the_last_one_that_was_lost(tmp_path: Path) -> None:
    with ExitStack() as processes:
        lazy = processes.enter_context(worker_process("a", tmp_path, answers_per_job=1))
        async with self_play(tmp_path) as (here, tasks):
            await here.until_ready(a=0)
            first_came = asyncio.Event()
            running = [tasks.create_task(here.collect(job_id, first_came)) for job_id in range(JOBS)]
            await first_came.wait()
            lazy.kill()
            processes.enter_context(worker_process("a", tmp_path, answers_per_job=SAMPLES, incarnation=1))
            await here.until_ready(a=1)
            assert_each_once([await task for task in running])
            assert here.engines.numbers()["lost_workers"] == 1
