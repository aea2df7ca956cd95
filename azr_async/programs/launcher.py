"""One run from its folder to its summary: starts the programs, listens to them, shows and tells what they say."""

import asyncio
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console

from azr_async.adapters.channels import ZmqReceiver, zmq_receiver
from azr_async.config import Config
from azr_async.errors import PeerVanished
from azr_async.messages import Progress
from azr_async.programs.folders import claimed_run_dir, forget_journal, new_run_dir, private_wires_dir
from azr_async.programs.placement import Placed, command, environment, free_port, place
from azr_async.programs.preflight import Resumed
from azr_async.programs.summary import (
    MetricsReader,
    how_it_failed,
    how_it_was_interrupted,
    how_it_was_lost,
    what_failed_while_stopping,
    what_was_learned,
)
from azr_async.programs.supervision import Deadlines, Ended, Loss, ProgramSpec, RunEnd, Supervisor
from azr_async.programs.view import View, ViewState, say
from azr_async.programs.wiring import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    endpoint,
    forget_last_words,
    read_last_words,
)

REDRAW_SECONDS: Final = 0.25
LINGER_SECONDS: Final = 10.0
"""How long programs that only served the learner may take to end after it."""


def launch(config: Config, *, output: Path | None, resumed: Resumed | None, env: Mapping[str, str]) -> int:
    """Run everything to its end, with a live view; returns the exit status of the command.

    A resumed run goes on in its own folder, or branches off into `output`.
    Raises ConfigError when the run directory cannot be written or is in use; then nothing was started.
    """
    old_dir = resumed.run_dir if resumed else None
    run_dir = output or old_dir or new_run_dir(config.run.name)
    history_from = old_dir if old_dir != run_dir else None
    with claimed_run_dir(run_dir, config, history_from), private_wires_dir() as wires_dir:
        if resumed is None:
            forget_journal(run_dir)
        checkpoint = resumed.checkpoint if resumed else None
        specs = program_specs(config, run_dir=run_dir, wires_dir=wires_dir, checkpoint=checkpoint, env=env)
        first_step = 0
        if resumed is not None:
            from azr_async.adapters.telemetry import METRICS_FILE, truncate_after  # loads torch; seldom needed

            truncate_after(run_dir / METRICS_FILE, resumed.step)  # steps that the resumed run takes again
            first_step = resumed.step + 1
        return run_programs(specs, config, run_dir=run_dir, wires_dir=wires_dir, first_step=first_step)


def run_programs(
    specs: Sequence[ProgramSpec], config: Config, *, run_dir: Path, wires_dir: Path, first_step: int = 0
) -> int:
    """Run the programs with a live view until the end, tell how it ended, and return the exit status.

    The view shows the lines of metrics.jsonl from `first_step` on, the summary tells of all.
    """
    console = Console()
    say(console, f"run directory: {run_dir}")
    metrics = MetricsReader(run_dir / "metrics.jsonl", first_step)
    end = uvloop.run(watch(specs, config, metrics=metrics, wires_dir=wires_dir, console=console))
    return _tell(end, config, run_dir=run_dir, wires_dir=wires_dir, console=console)


def program_specs(
    config: Config, *, run_dir: Path, wires_dir: Path, checkpoint: Path | None, env: Mapping[str, str]
) -> list[ProgramSpec]:
    """The programs of a run as plain data."""
    everyone, port = place(config), free_port()

    def spec(placed: Placed) -> ProgramSpec:
        return ProgramSpec(
            name=placed.process,
            argv=command(placed, run_dir=run_dir.absolute(), wires_dir=wires_dir, resume=checkpoint),
            env=environment(placed, everyone, env, rendezvous_port=port, run_dir=run_dir),
            log_path=run_dir / "logs" / f"{placed.process}.log",
            ends_the_run=placed.rank is not None,
            is_told_to_stop=placed.rank is not None or placed.process == "selfplay",
            max_restarts=config.run.max_restarts if placed.role == "generates" else 0,
        )

    return [spec(placed) for placed in everyone]


async def watch(
    specs: Sequence[ProgramSpec], config: Config, *, metrics: MetricsReader, wires_dir: Path, console: Console
) -> RunEnd:
    """Run the programs until the end, listening to their reports and drawing the view."""
    stop_seconds = config.wires.stop_seconds
    state = ViewState(steps=config.run.steps, processes={spec.name: "starting" for spec in specs})

    def on_loss(loss: Loss) -> None:
        state.news.append(how_it_was_lost(loss, read_last_words(wires_dir, loss.ended.name), config.run.max_restarts))
        forget_last_words(wires_dir, loss.ended.name)

    supervisor = Supervisor(
        specs,
        Deadlines(
            start_seconds=config.wires.start_seconds,
            stop_seconds=stop_seconds,
            linger_seconds=min(LINGER_SECONDS, stop_seconds),
        ),
        is_consequence=lambda name: (words := read_last_words(wires_dir, name)) is not None and words.is_consequence,
        on_loss=on_loss,
    )
    reports: ZmqReceiver[Progress] = zmq_receiver(
        endpoint(config, wires_dir, "launcher"),
        (Progress,),
        name="progress",
        capacity=64,
        expected_senders=len(specs) + sum(spec.max_restarts for spec in specs),
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
    )
    with _stop_signals(supervisor, state):
        async with reports, asyncio.TaskGroup() as group:
            listening = group.create_task(_listen(reports, supervisor, state), name="reports")
            with View(console, state) as view:
                drawing = group.create_task(_draw(view, state, supervisor, metrics), name="view")
                end = await supervisor.run()
                listening.cancel()
                drawing.cancel()
                _take(metrics, state, supervisor)
                view.redraw()
    return end


async def _listen(reports: ZmqReceiver[Progress], supervisor: Supervisor, state: ViewState) -> None:
    while True:
        try:
            async for progress in reports:
                supervisor.heard_of(progress.process)
                state.hear(progress)
            return
        except PeerVanished:
            continue  # a silent program is the supervisor's business, which sees the process itself


async def _draw(view: View, state: ViewState, supervisor: Supervisor, metrics: MetricsReader) -> None:
    while True:
        _take(metrics, state, supervisor)
        view.redraw()
        await asyncio.sleep(REDRAW_SECONDS)


def _take(metrics: MetricsReader, state: ViewState, supervisor: Supervisor) -> None:
    lines = metrics.new_lines()
    supervisor.is_under_way = supervisor.is_under_way or bool(lines)
    state.take(lines, supervisor.states())


@contextmanager
def _stop_signals(supervisor: Supervisor, state: ViewState) -> Iterator[None]:
    def on_signal() -> None:
        supervisor.request_stop()
        state.is_stopping = True  # the view tells

    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _tell(end: RunEnd, config: Config, *, run_dir: Path, wires_dir: Path, console: Console) -> int:
    lines = MetricsReader(run_dir / "metrics.jsonl").new_lines()
    bad = [one for one in end.programs if one.status != 0 and not one.was_told]
    if end.kind == "interrupted":
        left = {one.name: read_last_words(wires_dir, one.name) for one in end.programs}
        words = {name: last for name, last in left.items() if last is not None}
        messages = what_failed_while_stopping(end, words, run_dir)
        for message in messages:
            print(message, file=sys.stderr)
        say(console, how_it_was_interrupted(lines, config.run.steps, run_dir, is_saved=not messages))
        return EXIT_INTERRUPTED
    if end.kind == "failed":
        culprit = _first_cause(bad, wires_dir)
        last = read_last_words(wires_dir, culprit.name) if culprit else None
        print(how_it_failed(end, culprit, last.message if last else "", run_dir), file=sys.stderr)
        return EXIT_FAILED
    for one in bad:
        print(f"warning: {one.name} ended with status {one.status}; see {run_dir}/logs/{one.name}.log", file=sys.stderr)
    say(console, what_was_learned(lines, run_dir, end.restarts))
    return EXIT_DONE


def _first_cause(failed: Sequence[Ended], wires_dir: Path) -> Ended | None:
    """Of several programs that failed together, the one that did not fail because of another."""

    def order(one: Ended) -> tuple[bool, float]:
        words = read_last_words(wires_dir, one.name)
        return (words.is_consequence, words.at_seconds) if words else (False, one.at_seconds)

    return min(failed, key=order, default=None)
