"""One real run and what goes wrong in it: started, broken, continued until it is trained, checked."""

import asyncio
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from azr_async.algorithm.fault_schedule import EVERYTHING, Fault, Plan
from azr_async.config import Config
from azr_async.faults.inflict import Done, Scene, inflict
from azr_async.faults.invariants import damaged_checkpoints, last_step, newest_checkpoint, violations
from azr_async.faults.observer import Memory, observe
from azr_async.faults.processes import processes_of, send_all, wait_until_gone
from azr_async.faults.views import Proxies, open_proxies, prepare_site
from azr_async.programs.summary import begins_anew
from azr_async.programs.wiring import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED

Outcome = Literal["went on", "ended by name, resumed", "killed, resumed", "missed", "hang"]

LOOK_SECONDS: Final = 0.05
SETTLE_SECONDS: Final = 10.0
"""The kernel may still be clearing away what was killed."""
DUMP_SECONDS: Final = 2.0
GRACE_SECONDS: Final = 60.0
FRUITLESS_ATTEMPTS: Final = 2
"""Attempts in which nothing went wrong and which ended in an error all the same: then it will never end well."""

_NAMED: Final = re.compile(
    r"logs/(inference-\d+|selfplay|learner-\d+)\.log"
    r"|The run failed: .*(inference-\d+|selfplay|learner-\d+).* The logs are in ",
    re.DOTALL,
)
_DEADLY: Final = (("group", EVERYTHING), ("kill", "launcher"))
"""Faults that may end a launcher by a signal."""
_NOTICED: Final = re.compile(r"damaged on the way|has refused [0-9]+ messages")


@dataclass(slots=True)
class Inflicted:
    """A fault and what came of it."""

    fault: Fault
    done: Done
    step: int = 0
    """Last step that was told of when it was over."""
    outcome: Outcome = "missed"
    error: str = ""
    """What the run said when it ended."""


@dataclass(slots=True)
class Story:
    """What became of one run."""

    plan: Plan
    run_dir: Path
    inflicted: list[Inflicted] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    attempts: int = 0
    hangs: int = 0
    seconds: float = 0.0


Tell = Callable[[str], None]


async def play(plan: Plan, run_dir: Path, options: Mapping[str, str], config: Config, tell: Tell) -> Story:
    """Start the run, break it as planned, continue it until its steps are trained, and check what must hold.

    `config` is what the options make of the defaults; the plan adds to it.
    """
    story, memory, started = Story(plan, run_dir), Memory(), time.monotonic()
    faults, fruitless = deque(plan.faults), 0
    while True:
        story.attempts += 1
        before = len(faults)
        attempt = _Attempt(story, memory, faults, silence_seconds(config), tell)
        status = await attempt.run(_arguments(plan, run_dir, options, memory))
        attempt.end(status)
        # The checkpoint of the last step may be there although the run was killed a moment later.
        if status == EXIT_DONE or newest_checkpoint(run_dir) == config.run.steps:
            break
        fruitless = 0 if len(faults) < before else fruitless + 1
        if fruitless == FRUITLESS_ATTEMPTS:
            story.violations.append(f"cannot be continued: {attempt.error()}")
            break
    story.violations += violations(
        run_dir,
        memory,
        steps=config.run.steps,
        batch=len(config.flow.tasks) * (config.flow.propose_samples + config.flow.solve_samples),
        max_lag=plan.max_lag,
        has_ended_well=fruitless < FRUITLESS_ATTEMPTS,
    )
    story.seconds = time.monotonic() - started
    return story


def silence_seconds(config: Config) -> float:
    """Longest time without a step after which something must have happened, by the deadlines of the configuration.

    Twice, as for learner ranks, which wait for each other: for one deadline may only begin when another one ends.
    """
    wires = config.wires
    step_seconds = max(wires.step_seconds, config.learner.step_seconds)
    once = wires.start_seconds + step_seconds + config.weights.deadline_seconds + wires.peer_timeout_seconds
    return 2 * once + config.checkpoint.write_seconds + wires.stop_seconds + GRACE_SECONDS


class _Attempt:
    """One start of the run, to its end."""

    def __init__(self, story: Story, memory: Memory, faults: deque[Fault], silence_seconds: float, tell: Tell) -> None:
        self._story, self._memory, self._faults, self._tell = story, memory, faults, tell
        self._silence_seconds = silence_seconds
        self._run_dir = story.run_dir
        self._number = story.attempts
        self._console = story.run_dir.with_name(f"{story.run_dir.name}-console-{self._number}.txt")
        self._mine: list[Inflicted] = []
        self._log_sizes: dict[int, dict[Path, int]] = {}
        self._is_hang = False

    async def run(self, arguments: Sequence[str]) -> int:
        """Returns the exit status, or minus the signal that killed the launcher."""
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="azrf-")))
            prepare_site(folder)
            plan = self._story.plan
            proxies: Proxies = await stack.enter_async_context(open_proxies(folder, plan)) if plan.has_proxies else {}
            scene = Scene(run_dir=self._run_dir, folder=folder, proxies=proxies)
            with self._console.open("wb") as console:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "azr_async.programs.fault_start", str(folder), *arguments),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                )
            try:
                async with asyncio.TaskGroup() as group:
                    helpers = [
                        group.create_task(self._inflict_all(scene), name="faults"),
                        group.create_task(observe(self._run_dir, self._memory, self._last_step), name="observer"),
                    ]
                    status = await self._until_end(process)
                    for helper in helpers:
                        helper.cancel()
            except BaseException:  # the user has had enough
                send_all(processes_of(self._run_dir), signal.SIGKILL)
                raise
            finally:
                send_all(processes_of(self._run_dir), signal.SIGCONT)
                left = await wait_until_gone(self._run_dir, within_seconds=SETTLE_SECONDS)
                send_all(left, signal.SIGKILL)
            if left:
                names = ", ".join(f"{process.name} ({process.pid})" for process in left)
                self._violated(f"processes were left: {names}")
        return status

    def end(self, status: int) -> None:
        """The attempt is over: what came of its faults, and was it an end that a run may have?"""
        last, error = self._last_step(), self.error()
        was_killed = any(one.done.what and (one.fault.kind, one.fault.target) in _DEADLY for one in self._mine)
        for one in self._mine:
            if not one.done.what:
                continue
            went_on = status == EXIT_DONE or last >= one.step + 2
            one.outcome = "went on" if went_on else "killed, resumed" if status < 0 else "ended by name, resumed"
            if self._is_hang and not went_on:
                one.outcome = "hang"
            one.error = "" if went_on else error
            self._check_noticed(one)
            self._tell(f"    {one.fault.kind} {one.fault.target} ({one.done.what}): {one.outcome}")
        for damage in damaged_checkpoints(self._run_dir):
            self._violated(damage)
        if self._is_hang:
            return
        if status < 0 and not was_killed:
            self._violated(f"the launcher was killed by signal {-status}, but not by a fault")
        if status not in (EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED) and status >= 0:
            self._violated(f"ended with exit status {status}: {error}")
        if status == EXIT_FAILED and not is_named(error):
            self._violated(f"an error that names no process or no log: {error}")

    def error(self) -> str:
        """The end of what the run has said."""
        return last_words(self._console.read_text(encoding="utf-8", errors="replace"))

    async def _until_end(self, process: asyncio.subprocess.Process) -> int:
        ending = asyncio.ensure_future(process.wait())
        seen, since = (0, 0), time.monotonic()
        while not ending.done():
            await asyncio.wait([ending], timeout=LOOK_SECONDS)
            now = (self._last_step(), len(self._mine))
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self._silence_seconds:
                await self._break_off(time.monotonic() - since)
                since = time.monotonic()
        return ending.result()

    async def _break_off(self, seconds: float) -> None:
        """A hang: have every program tell where it is, then end it."""
        self._is_hang = True
        self._story.hangs += 1
        names = ", ".join(process.name for process in processes_of(self._run_dir))
        self._violated(f"no step and no end for {seconds:.0f} s after step {self._last_step()}; alive: {names}")
        send_all([one for one in processes_of(self._run_dir) if one.name != "launcher"], signal.SIGABRT)
        await asyncio.sleep(DUMP_SECONDS)
        send_all(processes_of(self._run_dir), signal.SIGKILL)

    async def _inflict_all(self, scene: Scene) -> None:
        while self._faults:
            fault = self._faults[0]
            await self._until_due(fault)
            self._faults.popleft()
            one = Inflicted(fault, Done())
            self._mine.append(one)
            self._story.inflicted.append(one)
            self._log_sizes[id(one)] = {path: path.stat().st_size for path in self._texts()}
            try:
                await inflict(fault, scene, one.done)
            finally:
                one.step = self._last_step()
            self._tell(f"  step {one.step}: {fault.kind} {fault.target}, {one.done.what or 'missed'}")

    async def _until_due(self, fault: Fault) -> None:
        """Its step is told of; for one at the start, the run has programs."""

        def is_due() -> bool:
            if fault.step:
                return self._last_step() >= fault.step
            return any(process.name == "selfplay" for process in processes_of(self._run_dir))

        while not is_due():  # noqa: ASYNC110  files and processes of others
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(fault.after_seconds)

    def _check_noticed(self, one: Inflicted) -> None:
        """A message whose content was changed must not be taken for one that was sent."""
        if one.fault.kind != "corrupt" or not one.done.what.startswith("message"):
            return
        sizes = self._log_sizes[id(one)]
        news = "".join(_text_from(path, sizes.get(path, 0)) for path in self._texts())
        if not is_noticed(news):
            self._violated(f"a changed message went unnoticed: {one.fault.target}, {one.done.what}")

    def _texts(self) -> list[Path]:
        return [*self._run_dir.glob("logs/*.log"), self._console]

    def _last_step(self) -> int:
        return last_step(self._run_dir)

    def _violated(self, text: str) -> None:
        self._story.violations.append(f"attempt {self._number}: {text}")
        self._tell(f"  VIOLATION in run {self._story.plan.number}: {text}")


def _arguments(plan: Plan, run_dir: Path, options: Mapping[str, str], memory: Memory) -> list[str]:
    """Start, or go on: from the newest checkpoint, or from the beginning with the tasks that were found."""
    settings = [word for option, value in options.items() for word in (option, value)]
    settings += ["--seed", str(plan.seed), "--max-lag", str(plan.max_lag)]
    settings += ["--inference-workers", str(plan.workers), "--learner-ranks", str(plan.ranks)]
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None and not begins_anew(run_dir):
        return ["--output", str(run_dir), *settings]
    memory.went_back_to(checkpoint or 0)
    return ["--resume", str(run_dir), *settings]


def last_words(text: str) -> str:
    """The end of what a run has said: whole lines, for the first of an error names the process."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("step ")]
    return "\n".join(lines[-20:])


def is_named(error: str) -> bool:
    """Does an error that ends a run name a process, and the log to read?"""
    return _NAMED.search(error) is not None


def is_noticed(news: str) -> bool:
    """Do logs say that a message did not arrive as it was sent? Which one, they do not say."""
    return _NOTICED.search(news) is not None


def _text_from(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
