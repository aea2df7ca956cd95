"""One run from its folder to its summary: starts the programs, listens to them, shows and tells what they say."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console

from azr_async.adapters.channels import ZmqReceiver, zmq_receiver
from azr_async.config import Config
from azr_async.errors import PeerVanished
from azr_async.messages import Progress
from azr_async.programs.folders import BOOKS, claimed_run_dir, forget_beginning, new_run_dir, private_wires_dir
from azr_async.programs.mailbox import mailbox
from azr_async.programs.placement import (
    Placed,
    command,
    environment,
    free_port,
    gpus_found,
    place,
    place_another,
)
from azr_async.programs.preflight import Resumed
from azr_async.programs.summary import (
    MetricsReader,
    how_it_failed,
    how_it_left,
    how_it_was_interrupted,
    how_it_was_lost,
    how_to_go_on,
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
from azr_async.programs.workforce import Workforce

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
    checkpoint = resumed.checkpoint if resumed else None
    elsewhere = {} if run_dir == old_dir else {"history_from": old_dir, "checkpoint": checkpoint}
    with claimed_run_dir(run_dir, config, **elsewhere), private_wires_dir() as wires_dir:
        if resumed is None:
            forget_beginning(run_dir)
        crew = Crew(config, run_dir=run_dir, wires_dir=wires_dir, checkpoint=checkpoint, env=env)
        first_step = 0
        if resumed is not None:
            from azr_async.adapters.telemetry import truncate_after  # loads torch; seldom needed

            for name in BOOKS:
                truncate_after(run_dir / name, resumed.step)  # steps that the resumed run takes again
            first_step = resumed.step + 1
        specs = crew.specs()
        return run_programs(specs, config, run_dir=run_dir, wires_dir=wires_dir, first_step=first_step, crew=crew)


def run_programs(
    specs: Sequence[ProgramSpec],
    config: Config,
    *,
    run_dir: Path,
    wires_dir: Path,
    first_step: int = 0,
    crew: "Crew | None" = None,
) -> int:
    """Run the programs with a live view until the end, tell how it ended, and return the exit status.

    The view shows the lines of metrics.jsonl from `first_step` on, the summary tells of all. Inference workers may be
    added and removed where there is a `crew` to place them.
    """
    console = Console()
    say(console, f"run directory: {run_dir}")
    metrics = MetricsReader(run_dir / "metrics.jsonl", first_step)
    end = uvloop.run(watch(specs, config, metrics=metrics, wires_dir=wires_dir, console=console, crew=crew))
    return _tell(end, config, run_dir=run_dir, wires_dir=wires_dir, console=console)


class Crew:
    """The programs of a run, as they are started."""

    def __init__(
        self, config: Config, *, run_dir: Path, wires_dir: Path, checkpoint: Path | None, env: Mapping[str, str]
    ) -> None:
        self.placed, self.run_dir = place(config), run_dir
        self._config, self._wires_dir, self._checkpoint, self._env = config, wires_dir, checkpoint, env
        self._port = free_port()

    def specs(self) -> list[ProgramSpec]:
        """All of them as plain data."""
        return [self.spec(placed) for placed in self.placed]

    def spec(self, placed: Placed) -> ProgramSpec:
        """One as plain data."""
        is_learner = placed.rank is not None
        return ProgramSpec(
            name=placed.process,
            argv=command(placed, run_dir=self.run_dir.absolute(), wires_dir=self._wires_dir, resume=self._checkpoint),
            env=environment(placed, self.placed, self._env, rendezvous_port=self._port, run_dir=self.run_dir),
            log_path=self.run_dir / "logs" / f"{placed.process}.log",
            ends_the_run=is_learner,
            is_told_to_stop=is_learner or placed.process == "selfplay",
            # What a learner rank holds is nowhere else.
            max_restarts=0 if is_learner else self._config.run.max_restarts,
        )

    async def place_another(self, index: int, taken: Collection[int]) -> Placed:
        """Where one more worker goes. Raises ConfigError when there is no room for it."""
        found = await asyncio.to_thread(gpus_found) if self._config.placement.inference_gpus else 0
        return place_another(self._config, index, taken, found)


async def watch(
    specs: Sequence[ProgramSpec],
    config: Config,
    *,
    metrics: MetricsReader,
    wires_dir: Path,
    console: Console,
    crew: Crew | None = None,
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
        on_removed=lambda ended: state.news.append(how_it_left(ended)),
    )
    with _stop_signals(supervisor, state):
        async with (
            _reports(config, wires_dir) as reports,
            _orders(crew, supervisor, wires_dir),
            asyncio.TaskGroup() as group,
        ):
            listening = group.create_task(_listen(reports, supervisor, state), name="reports")
            with View(console, state) as view:
                drawing = group.create_task(_draw(view, state, supervisor, metrics), name="view")
                end = await supervisor.run()
                listening.cancel()
                drawing.cancel()
                _take(metrics, state, supervisor)
                view.redraw()
    return end


def _reports(config: Config, wires_dir: Path) -> ZmqReceiver[Progress]:
    return zmq_receiver(
        endpoint(config, wires_dir, "launcher"),
        (Progress,),
        name="progress",
        capacity=64,
        expected_senders=0,
        heartbeat_seconds=config.wires.heartbeat_seconds,
        peer_timeout_seconds=config.wires.peer_timeout_seconds,
    )


async def _listen(reports: ZmqReceiver[Progress], supervisor: Supervisor, state: ViewState) -> None:
    while True:
        try:
            progress = await anext(reports)
        except PeerVanished as silence:
            supervisor.is_silent(silence.silent)
            continue
        supervisor.heard_of(progress.process)
        state.hear(progress)


@asynccontextmanager
async def _orders(crew: Crew | None, supervisor: Supervisor, wires_dir: Path) -> AsyncIterator[None]:
    """Carry out what `python -m azr_async workers` asks for."""
    if crew is None:
        yield
        return
    placed = {one.process: one for one in crew.placed}
    workforce = Workforce(supervisor, placed, crew.place_another, crew.spec)
    async with mailbox(crew.run_dir, wires_dir, workforce.carry_out):
        yield


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
        if way_on := how_to_go_on(run_dir):
            print(way_on, file=sys.stderr)
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
