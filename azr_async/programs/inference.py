"""An inference worker: serves self-play's jobs, takes new weights from the learner between two tokens.

The event loop only moves messages, so heartbeats go on while the engine computes: the embedded one in a thread of its
own (`engine_thread.py`), vLLM in processes of its own (`engine_vllm.py`).
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.config import Config
from azr_async.errors import ChannelClosed, PeerVanished, WeightsError
from azr_async.messages import (
    CancelJob,
    GenerateJob,
    GenerationResults,
    GivenUp,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
    WorkerReady,
)
from azr_async.programs.engine_thread import Answer, Order, embedded_server
from azr_async.programs.engine_vllm import vllm_server
from azr_async.programs.inference_jobs import Jobs
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
        _to_learner(config, wires_dir, name) as learner,
    ):
        ready = WorkerReady(
            worker=name,
            endpoint=jobs.endpoint,
            slots=config.engine.slots,
            ranks=server.ranks,
            incarnation=os.getpid(),
        )
        client = Client(ready, server, partial(_to_selfplay, config, wires_dir, name))
        answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        # Self-play closes after the learner: it may take what it has to end, or the learner what it has to give up.
        closing_seconds = max(config.weights.deadline_seconds, config.wires.stop_seconds)
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(client.serve(), name="self-play"),
                group.create_task(_take_jobs(jobs, client), name="jobs"),
                group.create_task(_take_weights(pushes, client, server, closing_seconds), name="pushes"),
                group.create_task(_stop_when_asked(reporter, server), name="stop"),
            ]
            await learner.send(replace(ready, endpoint=pushes.endpoint))
            reporter.report("waiting for weights")
            group.create_task(_forward(answers, client, learner, reporter), name="answers")
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


class _Left(Exception):
    """Self-play is gone."""


class Client:
    """Self-play, whoever that is by now. When one is gone its jobs are dropped, and the worker tells the next one that
    it is there: the weights stay."""

    def __init__(self, ready: WorkerReady, server: EngineServer, connect: Callable[[], ToSelfPlay]) -> None:
        """`connect` waits for whoever comes next, and has a deadline for that."""
        self.gone = asyncio.Event()
        """Nobody is there."""
        self._ready, self._server, self._connect = ready, server, connect
        self._jobs = Jobs()
        self._results: asyncio.Queue[GenerationResults] = asyncio.Queue()
        self._silent = asyncio.Event()

    def take(self, order: GenerateJob | CancelJob) -> None:
        """Self-play orders something. Nobody waits for a late order of one that is gone."""
        if self.gone.is_set():
            return
        self._server.give(self._jobs.order(order))

    def give(self, results: GenerationResults) -> None:
        """The engine has made something."""
        own = self._jobs.results(results)
        if own.completions:
            self._results.put_nowait(own)

    def went_silent(self) -> None:
        """No job can come from self-play any more. If it is there all the same, it has to learn of this worker anew."""
        self._silent.set()

    async def serve(self) -> None:
        """Tell self-play what it has asked for. Raises PeerVanished when nobody comes in time."""
        while True:
            with suppress(_Left):
                async with self._connect() as selfplay:
                    self.gone.clear()
                    self._silent.clear()
                    try:
                        await selfplay.send(self._ready)
                        why = await self._until_lost(selfplay)
                    except (PeerVanished, ChannelClosed) as lost:
                        why = str(lost)
                    self._forget(why)
                    raise _Left  # who leaves with an error does not wait for a farewell

    async def _until_lost(self, selfplay: ToSelfPlay) -> str:
        async def forward() -> None:
            with suppress(PeerVanished, ChannelClosed):  # `ended` tells
                while True:
                    await selfplay.send(await self._results.get())

        async with asyncio.TaskGroup() as group:
            ending = group.create_task(selfplay.ended(), name="self-play ended")
            silence = group.create_task(self._silent.wait(), name="self-play silent")
            forwarding = group.create_task(forward(), name="results")
            await asyncio.wait([ending, silence], return_when=asyncio.FIRST_COMPLETED)
            why = str(ending.result()) if ending.done() else "it sends no jobs any more."
            for task in (ending, silence, forwarding):
                task.cancel()
        return why

    def _forget(self, why: str) -> None:
        self.gone.set()
        orders = self._jobs.forget()
        log.info("self-play is gone, %d of its jobs are dropped: %s", len(orders), why)
        for order in orders:
            self._server.give(order)
        self._results = asyncio.Queue()


async def _take_jobs(jobs: ZmqReceiver[GenerateJob | CancelJob], client: Client) -> None:
    """Jobs -> engine."""
    while True:
        try:
            client.take(await anext(jobs))
        except PeerVanished as silence:
            log.warning("%s", silence)
            client.went_silent()


async def _take_weights(
    pushes: ZmqReceiver[JoinWeights | PushWeights | GivenUp],
    client: Client,
    server: EngineServer,
    closing_seconds: float,
) -> None:
    """Orders of the learner -> engine, which ends when it and self-play are gone.

    At the end of a run the learner closes first, and self-play with it. WeightsError when the learner goes on without
    this worker, so that it is started again, or when self-play does not close.
    """
    async for order in pushes:
        if isinstance(order, GivenUp):
            raise WeightsError(f"the learner goes on without this worker: {order.why}")
        server.give(order)
    try:
        async with asyncio.timeout(closing_seconds):
            await client.gone.wait()
    except TimeoutError:
        raise WeightsError(
            f"the learner closed its end {closing_seconds:g} s ago, and self-play did not. Look at logs/selfplay.log; "
            "raise wires.stop_seconds if it only needs longer to end."
        ) from None
    server.stop()


async def _stop_when_asked(reporter: Reporter, server: EngineServer) -> None:
    await reporter.stop_requested.wait()
    log.info("asked to stop")
    server.stop()


async def _forward(
    answers: asyncio.Queue[Answer | None], client: Client, learner: ToLearner, reporter: Reporter
) -> None:
    """Answers -> whoever asked. One who has closed wants no more answers."""
    while (answer := await answers.get()) is not None:
        try:
            match answer:
                case GenerationResults():
                    client.give(answer)
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
        expected_senders=0,  # self-play may be started again
        join_seconds=config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb * 2**20,
    )


def _pushes(config: Config, wires_dir: Path, name: str) -> ZmqReceiver[JoinWeights | PushWeights | GivenUp]:
    return zmq_receiver(
        endpoint(config, wires_dir, f"{name}-push"),
        (JoinWeights, PushWeights, GivenUp),
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
