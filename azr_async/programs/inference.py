"""An inference worker: serves self-play's jobs, takes new weights from the learner between two tokens.

The event loop only moves messages, so heartbeats go on while the engine computes: the embedded one in a thread of its
own (`engine_thread.py`), vLLM in processes of its own (`engine_vllm.py`).
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.config import Config
from azr_async.errors import ChannelClosed, WeightsError
from azr_async.messages import (
    CancelJob,
    GenerateJob,
    GenerationResults,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
    WorkerReady,
)
from azr_async.programs.engine_thread import Answer, Order, embedded_server
from azr_async.programs.engine_vllm import vllm_server
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
    async with (
        _engine_server(config, name) as server,
        _jobs(config, wires_dir, name) as jobs,
        _pushes(config, wires_dir, name) as pushes,
        _to_selfplay(config, wires_dir, name) as selfplay,
        _to_learner(config, wires_dir, name) as learner,
    ):
        ready = WorkerReady(
            worker=name,
            endpoint=jobs.endpoint,
            slots=config.engine.slots,
            ranks=server.ranks,
            incarnation=os.getpid(),
        )
        await selfplay.send(ready)
        await learner.send(replace(ready, endpoint=pushes.endpoint))
        reporter.report("waiting for weights")
        answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        # Self-play closes after the learner: it may take what it has to end, or the learner what it has to give up.
        closing_seconds = max(config.weights.deadline_seconds, config.wires.stop_seconds)
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(_read(jobs, pushes, server, closing_seconds), name="orders"),
                group.create_task(_stop_when_asked(reporter, server), name="stop"),
            ]
            group.create_task(_forward(answers, selfplay, learner, reporter), name="answers")
            try:
                await server.run(answers.put_nowait)
            finally:
                answers.put_nowait(None)
            for helper in helpers:
                helper.cancel()


class EngineServer(Protocol):
    """An engine that takes orders."""

    ranks: int
    """Processes of it that hold weights."""

    def give(self, order: Order) -> None:
        """Queue an order."""

    def stop(self) -> None:
        """End `run`; what is still running is dropped."""

    async def run(self, answer: Callable[[Answer], object]) -> None:
        """Carry out orders until `stop`, answering in the event loop."""


def _engine_server(config: Config, name: str) -> AbstractAsyncContextManager[EngineServer]:
    return (vllm_server if config.engine_kind == "vllm" else embedded_server)(config, name)


async def _read(
    jobs: ZmqReceiver[GenerateJob | CancelJob],
    pushes: ZmqReceiver[JoinWeights | PushWeights],
    server: EngineServer,
    closing_seconds: float,
) -> None:
    """Orders -> engine, which ends when nobody can send any more.

    At the end of a run the learner closes first, and self-play with it. If self-play goes on, the learner has gone on
    without this worker: WeightsError, so that it is started again.
    """

    async def hand_over(orders: ZmqReceiver[GenerateJob | CancelJob] | ZmqReceiver[JoinWeights | PushWeights]) -> None:
        async for order in orders:
            server.give(order)

    async with asyncio.TaskGroup() as group:
        playing = group.create_task(hand_over(jobs), name="jobs")
        await hand_over(pushes)
        await asyncio.wait([playing], timeout=closing_seconds)
        if not playing.done():
            raise WeightsError(
                f"the learner closed its end {closing_seconds:g} s ago and the run goes on: it has given this worker "
                "up. Look at logs/learner-0.log for why; raise weights.deadline_seconds if this worker was only slow."
            )
    server.stop()


async def _stop_when_asked(reporter: Reporter, server: EngineServer) -> None:
    await reporter.stop_requested.wait()
    log.info("asked to stop")
    server.stop()


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


def _jobs(config: Config, wires_dir: Path, name: str) -> ZmqReceiver[GenerateJob | CancelJob]:
    return zmq_receiver(
        endpoint(config, wires_dir, f"{name}-jobs"),
        (GenerateJob, CancelJob),
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
