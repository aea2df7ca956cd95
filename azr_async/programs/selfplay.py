"""The self-play process: adapters around the graph of `graph.py`. It imports no GPU stack."""

import asyncio
import logging
import sys
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, zmq_receiver, zmq_sender
from azr_async.adapters.engine_client import RemoteEngines
from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.library import Library
from azr_async.config import Config
from azr_async.messages import (
    BatchRequest,
    EvaluationRequest,
    GenerateJob,
    GenerationResults,
    Problem,
    WeightsReady,
    WorkerReady,
)
from azr_async.programs.graph import Reply, Request, self_play
from azr_async.programs.parts import Parts
from azr_async.programs.seeds import add_seed_file
from azr_async.programs.wiring import Reporter, endpoint, load_run_config, program_main, program_parser
from azr_async.starter.suite import STARTER_SUITE, load_suite

log = logging.getLogger(__name__)

JOURNAL_FILE = "journal.sqlite"


def main() -> int:
    """Started by the launcher."""
    arguments = program_parser("Self-play stage of a run.").parse_args()
    config = load_run_config(arguments.run_dir)
    run_self_play = partial(run, config=config, run_dir=arguments.run_dir, wires_dir=arguments.wires)
    return program_main("selfplay", arguments.run_dir, arguments.wires, config, run_self_play)


async def run(reporter: Reporter, *, config: Config, run_dir: Path, wires_dir: Path) -> None:
    """Enter every adapter, then serve the learner until it has closed its end."""
    suite = load_problems(config)
    library = Library(capacity=config.library.capacity, seed=config.run.seed)
    with SqliteJournal(run_dir / JOURNAL_FILE) as journal:
        for problem in journal.problems():
            library.add(problem)
        async with (
            _sandbox(config, run_dir) as sandbox,
            _results(config, wires_dir) as results,
            _requests(config, wires_dir) as requests,
            asyncio.TaskGroup() as group,
        ):
            log.info("sandbox layers: %s", sandbox.layers)
            engines = _engines(config, wires_dir, results)
            group.create_task(engines.run(), name="engines")
            parts = Parts(
                config=config,
                engine=engines,
                sandbox=sandbox,
                dialogue=make_dialogue(config.model.dialogue, allowed_imports=config.sandbox.allowed_imports),
                journal=journal,
                library=library,
                suite=suite,
                usage=partial(_usage, engines, sandbox),
                report=reporter.report,
                group_ids=count(-1, -1),
            )
            if config.library.seed_file is not None:
                await add_seed_file(
                    config.library.seed_file,
                    library,
                    sandbox=sandbox,
                    config=config.propose,
                    held_out_programs=parts.held_out_programs,
                )
            reporter.report("waiting for weights", 0, 0)
            await self_play(parts, requests, _replies(config, wires_dir), stop=reporter.stop_requested)
            engines.stop()


def load_problems(config: Config) -> list[Problem]:
    """The held-out suite of a run."""
    if config.evaluation.suite == "none":
        return []
    return load_suite(STARTER_SUITE if config.evaluation.suite == "starter" else Path(config.evaluation.suite))


def _usage(engines: RemoteEngines, sandbox: SandboxPool) -> Mapping[str, float]:
    return {
        "busy.inference": sum(totals.busy_seconds for totals in engines.totals.values()),
        "busy.sandbox": sandbox.busy_seconds,
        "tokens.generated": float(sum(totals.generated_tokens for totals in engines.totals.values())),
    }


def _engines(config: Config, wires_dir: Path, results: ZmqReceiver[GenerationResults | WorkerReady]) -> RemoteEngines:
    def connect(ready: WorkerReady) -> ZmqSender[GenerateJob]:
        return zmq_sender(
            ready.endpoint,
            name="selfplay",
            peer=ready.worker,
            heartbeat_seconds=config.wires.heartbeat_seconds,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
            connect_seconds=config.wires.start_seconds,
        )

    return RemoteEngines(
        results,
        connect,
        expected_workers=[f"inference-{index}" for index in range(config.inference_workers)],
        ready_seconds=config.wires.start_seconds,
        job_seconds=config.wires.step_seconds,
        oversubscription=config.engine.oversubscription,
    )


def _sandbox(config: Config, run_dir: Path) -> SandboxPool:
    return SandboxPool(
        workers=config.sandbox.workers,
        wall_seconds=config.sandbox.wall_seconds,
        cpu_seconds=config.sandbox.cpu_seconds,
        memory_mb=config.sandbox.memory_mb,
        allowed_imports=config.sandbox.allowed_imports,
        label=str(run_dir),
    )


def _results(config: Config, wires_dir: Path) -> ZmqReceiver[GenerationResults | WorkerReady]:
    return zmq_receiver(
        endpoint(config, wires_dir, "selfplay-results"),
        (GenerationResults, WorkerReady),
        name="selfplay",
        capacity=256,
        expected_senders=config.inference_workers,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb << 20,
    )


def _requests(config: Config, wires_dir: Path) -> ZmqReceiver[Request]:
    return zmq_receiver(
        endpoint(config, wires_dir, "selfplay-requests"),
        (BatchRequest, EvaluationRequest, WeightsReady),
        name="selfplay",
        capacity=64,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
    )


def _replies(config: Config, wires_dir: Path) -> ZmqSender[Reply]:
    return zmq_sender(
        endpoint(config, wires_dir, "learner-batches"),
        name="selfplay",
        peer="learner-0",
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        connect_seconds=config.wires.start_seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
