"""`python -m azr_async faults`: breaks real runs on purpose, continues them, and checks that nothing was lost.

Starts runs of the starter model, kills and stops their processes, tampers with their messages, fills their disk and
moves their clock as a seeded schedule says; resumes what ended; then compares what every run has left with what must
hold (docs/reliability.md). Exit status 0: nothing was violated.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console

from azr_async.algorithm.fault_schedule import KINDS, Kind, Plan, plan
from azr_async.config import Config
from azr_async.errors import AzrError, ConfigError
from azr_async.programs.arguments import whole_number
from azr_async.programs.commandline import load, parse
from azr_async.programs.fault_run import Story, play
from azr_async.programs.fault_table import inflicted, report, table
from azr_async.programs.folders import new_run_dir
from azr_async.programs.wiring import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE

REPORT_FILE: Final = "faults.json"
REPORT_COLUMNS: Final = 120
"""Width of the table where no terminal tells its own."""
RUN_OPTIONS: Final[Mapping[str, str]] = {
    "--flow.propose-samples": "2",
    "--flow.solve-samples": "8",
    "--solve.attempts": "4",
    "--solve.trained-attempts": "4",
    "--library.seed-tasks": "4",
    "--evaluation.suite": "none",
    "--checkpoint.every-steps": "5",
    "--wires.heartbeat-seconds": "0.5",
    "--wires.peer-timeout-seconds": "6",
    "--wires.start-seconds": "90",
    "--wires.step-seconds": "40",
    "--wires.stop-seconds": "20",
    "--weights.deadline-seconds": "10",
    "--learner.step-seconds": "40",
    "--checkpoint.write-seconds": "40",
}
"""Small batches and short deadlines: a step takes part of a second, and what is broken is noticed soon."""
SCHEDULED: Final = frozenset(
    {
        *("--seed", "--max-lag", "--inference-workers", "--learner-ranks"),
        *("--run.seed", "--flow.max-lag", "--placement.inference-workers", "--placement.learner-ranks"),
    }
)
"""Settings that each run draws for itself."""


def main(arguments: Sequence[str]) -> int:
    """Break runs until enough faults were inflicted; returns the exit status."""
    options, rest = _parser().parse_known_args(arguments)
    try:
        settings = {**RUN_OPTIONS, "--steps": str(options.steps), **_settings(rest)}
        config = _checked(settings)
        output = _output(options.output)
    except AzrError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    width = None if sys.stdout.isatty() else REPORT_COLUMNS
    console, stories = Console(highlight=False, soft_wrap=True, width=width), list[Story]()

    def next_plan() -> Plan:
        return plan(
            options.seed,
            options.first_run + len(stories),
            kinds=options.kinds,
            per_run=options.per_run,
            steps=config.run.steps,
            peer_timeout_seconds=config.wires.peer_timeout_seconds,
        )

    def is_enough() -> bool:
        return bool(len(stories) >= options.runs if options.runs else inflicted(stories) >= options.faults)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run may outlive this command
    try:
        while not is_enough():
            story = _play(next_plan(), output, settings, config, console)
            stories.append(story)
            text = json.dumps(report(stories, seed=options.seed, arguments=arguments), indent=1)
            (output / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
            if not story.violations and not options.keep_runs:
                shutil.rmtree(story.run_dir)
    except KeyboardInterrupt:
        console.print("stopped; what was shown so far:")
        return _tell(stories, output, console) or EXIT_INTERRUPTED
    return _tell(stories, output, console)


def _play(broken: Plan, output: Path, settings: Mapping[str, str], config: Config, console: Console) -> Story:
    run_dir = output / f"run-{broken.number:03d}"
    shape = f"{broken.workers} inference, {broken.ranks} learner ranks, max lag {broken.max_lag}"
    console.print(f"run {broken.number}: {shape}; {', '.join(fault.kind for fault in broken.faults)}", markup=False)
    story = uvloop.run(play(broken, run_dir, settings, config, lambda line: console.print(line, markup=False)))
    verdict = f"{len(story.violations)} VIOLATIONS" if story.violations else "all held"
    console.print(f"  {verdict}: {story.attempts} starts, {story.seconds:.0f} s", markup=False)
    for violation in story.violations:
        console.print(f"    {violation}", markup=False)
    return story


def _tell(stories: Sequence[Story], output: Path, console: Console) -> int:
    console.print(table(stories))
    broken = sum(len(story.violations) for story in stories)
    console.print(
        f"{len(stories)} runs, {sum(story.attempts for story in stories)} starts, {inflicted(stories)} faults, "
        f"{sum(story.hangs for story in stories)} hangs, {broken} violations. All of it: {output / REPORT_FILE}",
        markup=False,
    )
    return EXIT_FAILED if broken else EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async faults",
        description="Break real runs of the starter model on purpose, continue them, and check that no task was lost, "
        "no sample trained twice, no bound broken, and that nothing hung. The same seed gives the same schedule.",
        epilog="Every further --section.field VALUE is a setting of the runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--faults", type=whole_number(1), default=30, help="how many to inflict [30]")
    parser.add_argument("--runs", type=whole_number(1), default=0, help="how many runs, instead of a number of faults")
    parser.add_argument(
        "--first-run", type=whole_number(0), default=0, help="number of the first run, to repeat one [0]"
    )
    parser.add_argument("--per-run", type=whole_number(1), default=3, help="faults of one run [3]")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule [0]")
    parser.add_argument("--kinds", type=_kinds, default=KINDS, help=f"some of {','.join(KINDS)} [all]")
    parser.add_argument("--steps", type=whole_number(1), default=60, help="of each run [60]")
    parser.add_argument("--output", type=Path, help="empty folder for runs and faults.json [runs/<time>-faults]")
    parser.add_argument("--keep-runs", action="store_true", help="keep the folders of runs in which all held as well")
    return parser


def _kinds(text: str) -> tuple[Kind, ...]:
    wanted = text.split(",")
    if unknown := [word for word in wanted if word not in KINDS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {','.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in wanted)


def _settings(words: Sequence[str]) -> dict[str, str]:
    """`--name value` and `--name=value`, in the spelling of `RUN_OPTIONS`."""
    joined = " ".join(words).replace("=", " ").split()
    names, values = joined[::2], joined[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ConfigError("settings of the runs are pairs: --section.field VALUE. `--help` shows the other options.")
    return {name.replace("_", "-"): value for name, value in zip(names, values, strict=True)}


def _checked(settings: Mapping[str, str]) -> Config:
    """The configuration of the runs, but for what the schedule draws.

    Raises ConfigError when they could not be started so.
    """
    if fixed := sorted(SCHEDULED & settings.keys()):
        raise ConfigError(f"{', '.join(fixed)}: every run draws its own. Leave it out; another --seed draws others.")
    if not sys.platform.startswith("linux"):
        raise ConfigError("faults are inflicted with means that only Linux has. Run this on Linux.")
    config = load(parse([word for pair in settings.items() for word in pair]))
    if not config.checkpoint.every_steps:
        raise ConfigError("--checkpoint.every-steps 0: what is killed could not be continued. Give it 1 or more.")
    return config


def _output(wish: Path | None) -> Path:
    folder = (wish or new_run_dir("faults")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"--output: {folder} is not empty. Choose another folder.")
    return folder
