"""An inference worker: serves self-play's jobs, takes new weights from the learner between two tokens.

The engine and the weight group live in a thread of their own (`engine_thread.py`); the event loop only moves messages,
so heartbeats go on while the engine computes.
"""

import asyncio
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.config import Config
from azr_async.errors import ChannelClosed
from azr_async.messages import (
    GenerateJob,
    GenerationResults,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
    WorkerReady,
)
from azr_async.programs.engine_thread import Answer, EngineThread, load_engine
from azr_async.programs.wiring import Reporter, endpoint, load_run_config, program_main, program_parser

CAPACITY = 256
"""Unread messages per sender; the engine's thread takes them at every step."""

ToSelfPlay = ZmqSender[WorkerReady | GenerationResults]
ToLearner = ZmqSender[WorkerReady | WeightsJoined | WeightsInstalled]

log = logging.getLogger(__name__)


def main() -> int:
    """Started by the launcher; returns the exit status."""
    parser = program_parser("Generates completions for self-play.")
    parser.add_argument("--index", type=int, required=True, help="number of this worker")
    arguments = parser.parse_args()
    config = load_run_config(arguments.run_dir)
    name = f"inference-{arguments.index}"
    program = partial(serve, name=name, config=config, wires_dir=arguments.wires)
    return program_main(name, arguments.run_dir, arguments.wires, config, program)


async def serve(reporter: Reporter, *, name: str, config: Config, wires_dir: Path) -> None:
    """Be an inference worker until self-play and the learner have both closed their ends, or a stop is requested.

    Raises:
        AzrError: what went wrong, who did not answer, and what to do.
    """
    reporter.report("loading the model")
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as executor:
        engine = await asyncio.get_running_loop().run_in_executor(executor, partial(load_engine, config))
        async with (
            _jobs(config, wires_dir, name) as jobs,
            _pushes(config, wires_dir, name) as pushes,
            _to_selfplay(config, wires_dir, name) as selfplay,
            _to_learner(config, wires_dir, name) as learner,
        ):
            slots = config.engine.slots
            await selfplay.send(WorkerReady(worker=name, endpoint=jobs.endpoint, slots=slots))
            await learner.send(WorkerReady(worker=name, endpoint=pushes.endpoint, slots=slots))
            reporter.report("waiting for weights")
            answers: asyncio.Queue[Answer | None] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            thread = EngineThread(
                name, engine, config, answer=lambda answer: loop.call_soon_threadsafe(answers.put_nowait, answer)
            )
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(_read(jobs, pushes, thread), name="orders"),
                    group.create_task(_stop_when_asked(reporter, thread), name="stop"),
                ]
                group.create_task(_forward(answers, selfplay, learner, reporter), name="answers")
                try:
                    await _run(thread, executor)
                finally:
                    answers.put_nowait(None)
                for helper in helpers:
                    helper.cancel()


async def _run(thread: EngineThread, executor: ThreadPoolExecutor) -> None:
    """Wait for the thread; a cancellation stops it and waits until it has."""
    work = asyncio.get_running_loop().run_in_executor(executor, thread.run)
    try:
        await asyncio.shield(work)
    finally:
        thread.stop()
        await asyncio.wait([work])


async def _read(
    jobs: ZmqReceiver[GenerateJob], pushes: ZmqReceiver[JoinWeights | PushWeights], thread: EngineThread
) -> None:
    """Orders -> engine thread, which ends when nobody can send any more."""

    async def hand_over(orders: ZmqReceiver[GenerateJob] | ZmqReceiver[JoinWeights | PushWeights]) -> None:
        async for order in orders:
            thread.give(order)

    async with asyncio.TaskGroup() as group:
        group.create_task(hand_over(jobs), name="jobs")
        group.create_task(hand_over(pushes), name="pushes")
    thread.stop()


async def _stop_when_asked(reporter: Reporter, thread: EngineThread) -> None:
    await reporter.stop_requested.wait()
    log.info("asked to stop")
    thread.stop()


async def _forward(
    answers: asyncio.Queue[Answer | None], selfplay: ToSelfPlay, learner: ToLearner, reporter: Reporter
) -> None:
    """Answers -> whoever asked. One who has closed wants no more answers."""
    while (answer := await answers.get()) is not None:
        try:
            match answer:
                case GenerationResults():
                    await selfplay.send(answer)
                case WeightsJoined():
                    await learner.send(answer)
                case WeightsInstalled():
                    await learner.send(answer)
                    reporter.report(f"generating with version {answer.version}")
        except ChannelClosed as closed:
            log.info("%s dropped: %s", type(answer).__name__, closed)


def _jobs(config: Config, wires_dir: Path, name: str) -> ZmqReceiver[GenerateJob]:
    return zmq_receiver(
        endpoint(config, wires_dir, f"{name}-jobs"),
        (GenerateJob,),
        name=f"{name}-jobs",
        capacity=CAPACITY,
        join_seconds=config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )


def _pushes(config: Config, wires_dir: Path, name: str) -> ZmqReceiver[JoinWeights | PushWeights]:
    return zmq_receiver(
        endpoint(config, wires_dir, f"{name}-push"),
        (JoinWeights, PushWeights),
        name=f"{name}-push",
        capacity=CAPACITY,
        join_seconds=config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
    )


def _to_selfplay(config: Config, wires_dir: Path, name: str) -> ToSelfPlay:
    return zmq_sender(
        endpoint(config, wires_dir, "selfplay-results"),
        name=name,
        peer="selfplay",
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        connect_seconds=config.wires.start_seconds,
    )


def _to_learner(config: Config, wires_dir: Path, name: str) -> ToLearner:
    return zmq_sender(
        endpoint(config, wires_dir, "learner-weights"),
        name=name,
        peer="learner-0",
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        connect_seconds=config.wires.start_seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
