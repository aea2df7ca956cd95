"""The self-play process: adapters around the graph of `graph.py`. It imports no GPU stack."""

import asyncio
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from azr_async.adapters.channels import ZmqContext, ZmqReceiver, ZmqSender, shared_context, zmq_receiver, zmq_sender
from azr_async.adapters.engine_client import RemoteEngines
from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.processor_time import children_seconds
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.jobs import loop_seed
from azr_async.algorithm.library import Library, TaskUse, identity_problem, task_key
from azr_async.algorithm.validity import program_key
from azr_async.config import Config
from azr_async.errors import CheckpointError
from azr_async.messages import (
    BatchRequest,
    CancelJob,
    EvaluationRequest,
    GenerateJob,
    GenerationResults,
    Handover,
    Problem,
    SelfPlayState,
    StateRequest,
    WeightsReady,
    WorkerReady,
)
from azr_async.programs.course import Reply
from azr_async.programs.folders import JOURNAL_FILE
from azr_async.programs.graph import Request, self_play
from azr_async.programs.parts import Parts
from azr_async.programs.seeds import add_seeds, seed_problems
from azr_async.programs.standing import Standing, library_of, read
from azr_async.programs.wiring import Reporter, endpoint, load_run_config, program_main, program_parser
from azr_async.starter.suite import STARTER_SUITE, load_suite

log = logging.getLogger(__name__)

Results = ZmqReceiver[GenerationResults | WorkerReady]


def main() -> int:
    """Started by the launcher."""
    arguments = program_parser("Self-play stage of a run.").parse_args()
    config = load_run_config(arguments.run_dir)
    run_self_play = partial(run, config=config, run_dir=arguments.run_dir, wires_dir=arguments.wires)
    return program_main("selfplay", arguments.run_dir, arguments.wires, config, run_self_play)


async def run(reporter: Reporter, *, config: Config, run_dir: Path, wires_dir: Path) -> None:
    """Enter every adapter, then serve the learner until it has closed its end."""
    suite = load_problems(config)
    with SqliteJournal(run_dir / JOURNAL_FILE) as journal:
        async with (
            _sandbox(config, run_dir) as sandbox,
            _results(config, wires_dir) as results,
            _requests(config, wires_dir) as requests,
            shared_context() as context,
            asyncio.TaskGroup() as group,
        ):
            log.info("sandbox layers: %s", sandbox.layers)
            if sandbox.weakness:
                log.warning(sandbox.weakness)
            engines = _engines(config, results, context)
            group.create_task(engines.run(), name="engines")
            seeds = await _seeds(config, sandbox, suite)

            async def begin(version: int, state: str, handover: Handover | None) -> Parts:
                standing = known_standing(config, state, version=version)
                if handover is not None and handover.has_begun:
                    standing = left_standing(config, journal, version=version, incarnation=handover.incarnation)
                return Parts(
                    config=config,
                    engine=engines,
                    sandbox=sandbox,
                    dialogue=make_dialogue(config.model.dialogue, allowed_imports=config.sandbox.allowed_imports),
                    journal=journal,
                    library=await restored_library(config, journal, seeds, version=version, standing=standing),
                    suite=suite,
                    usage=partial(_usage, engines, sandbox),
                    gauges=partial(_gauges, engines, sandbox, journal),
                    notes=_notes(sandbox),
                    report=reporter.report,
                    group_ids=count(standing.next_round if standing else -1, -1),
                    start_version=version,
                    standing=standing,
                    handover=handover,
                )

            reporter.report("waiting for weights", 0, 0)
            await self_play(
                begin,
                requests,
                _replies(config, wires_dir),
                stop=reporter.stop_requested,
                on_weights=lambda ready: engines.installed(ready.workers),
            )
            engines.stop()


def known_standing(config: Config, state: str, *, version: int) -> Standing | None:
    """Where self-play stood at the checkpoint that the run is resumed at; None when the checkpoint does not say.

    With another `run.seed` it goes on from there, but draws otherwise.
    """
    if not state:
        return None
    standing = read(state)
    if standing.version != version:
        raise CheckpointError(
            f"selfplay.json of the checkpoint is of version {standing.version}, its weights are of version {version}. "
            "Resume from another checkpoint."
        )
    if standing.run_seed != config.run.seed:
        return replace(standing, seed=loop_seed(config.run.seed, version))
    return standing


def left_standing(config: Config, journal: SqliteJournal, *, version: int, incarnation: int) -> Standing | None:
    """Where self-play stood, by what a process that was lost has left in the journal; None while the library was still
    being filled.

    What was drawn under `version` and not written down is drawn otherwise, so that it is not only found again.
    """
    newest = journal.newest_groups()
    if not newest:
        return None
    found = {task_key(task.problem) for task in journal.tasks() if task.version < version}
    first = {task_key(identity_problem(task)): TaskUse() for task in ("deduction", "abduction")}
    return Standing(
        version=version,
        run_seed=config.run.seed,
        seed=loop_seed(loop_seed(config.run.seed, version), incarnation),
        first_group=max(newest.values()) + 1,
        next_round=-1,
        newest_task=journal.newest_task,
        tasks=first | {key: use for key, use in journal.uses().items() if key in found},
    )


async def restored_library(
    config: Config,
    journal: SqliteJournal,
    seeds: Sequence[Problem],
    *,
    version: int,
    standing: Standing | None = None,
) -> Library:
    """What was known when weights of `version` were installed; what was found under these is known when newer come.

    Without a `standing` all that was found under weights up to `version` is known at once.
    """
    held_out = {program_key(problem.program) for problem in load_problems(config)}
    tasks = journal.tasks()
    if standing is None:
        library = Library(capacity=config.library.capacity, seed=loop_seed(config.run.seed, version))
        later = [found for found in tasks if found.version > version]
        for found in tasks:
            if found.version <= version:
                library.add(found.problem)
    else:
        library = library_of(standing, (found.problem for found in tasks), capacity=config.library.capacity)
        later = [found for found in tasks if found.number > standing.newest_task or found.version >= version]
    for found in later:
        if program_key(found.problem.program) not in held_out:
            library.expect(found.problem, group_id=found.group_id or 0, version=found.version)
    for known in library.known():
        if program_key(known.problem.program) in held_out:  # the suite may be another one than when it was found
            library.discard(known.problem)
    await add_seeds(seeds, library, journal)
    return library


def load_problems(config: Config) -> list[Problem]:
    """The held-out suite of a run."""
    if config.evaluation.suite == "none":
        return []
    return load_suite(STARTER_SUITE if config.evaluation.suite == "starter" else Path(config.evaluation.suite))


async def _seeds(config: Config, sandbox: SandboxPool, suite: Sequence[Problem]) -> list[Problem]:
    """Before anything is waited for: a file that cannot be used is told at once."""
    if config.library.seed_file is None:
        return []
    return await seed_problems(
        config.library.seed_file,
        sandbox=sandbox,
        config=config.propose,
        held_out_programs={program_key(problem.program) for problem in suite},
    )


def _usage(engines: RemoteEngines, sandbox: SandboxPool) -> Mapping[str, float]:
    return {
        "busy.inference": sum(totals.busy_seconds for totals in engines.totals.values()),
        "busy.sandbox": sandbox.busy_seconds,
        "tokens.generated": float(sum(totals.generated_tokens for totals in engines.totals.values())),
        "cpu.selfplay": time.process_time(),
        "cpu.sandbox": children_seconds(),
    }


def _gauges(engines: RemoteEngines, sandbox: SandboxPool, journal: SqliteJournal) -> Mapping[str, float]:
    """Counters of the engines, the sandbox and the journal."""
    return (
        {f"engines.{name}": number for name, number in engines.numbers().items()}
        | {f"sandbox.{name}": number for name, number in sandbox.numbers().items()}
        | {f"journal.{name}": number for name, number in journal.numbers().items()}
    )


def _notes(sandbox: SandboxPool) -> Mapping[str, str]:
    """What isolates the programs, layer by layer, and whether they could get out all the same."""
    layers = {f"sandbox.layers.{name}": state for name, state in sandbox.layers.items()}
    return layers | ({"sandbox.weakness": sandbox.weakness} if sandbox.weakness else {})


def _engines(config: Config, results: Results, context: ZmqContext) -> RemoteEngines:
    def connect(ready: WorkerReady) -> ZmqSender[GenerateJob | CancelJob]:
        return zmq_sender(
            ready.endpoint,
            name="selfplay",
            peer=ready.worker,
            heartbeat_seconds=config.wires.heartbeat_seconds,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
            connect_seconds=config.wires.start_seconds,
            context=context,
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
    return SandboxPool(**config.sandbox.model_dump(), label=str(run_dir))


def _results(config: Config, wires_dir: Path) -> Results:
    return zmq_receiver(
        endpoint(config, wires_dir, "selfplay-results"),
        (GenerationResults, WorkerReady),
        name="selfplay",
        capacity=256,
        expected_senders=0,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb << 20,
    )


def _requests(config: Config, wires_dir: Path) -> ZmqReceiver[Request]:
    return zmq_receiver(
        endpoint(config, wires_dir, "selfplay-requests"),
        (Handover, BatchRequest, EvaluationRequest, StateRequest, SelfPlayState, WeightsReady),
        name="selfplay",
        capacity=64,
        # The learner comes when all workers are there, and says itself who is not.
        join_seconds=2 * config.wires.start_seconds,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
        limit_bytes=config.wires.message_mb << 20,
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
