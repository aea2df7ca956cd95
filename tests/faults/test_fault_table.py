"""The table of what broken runs have shown counts every fault once, where it belongs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from azr_async.adapters.channels.protocol import damage
from azr_async.algorithm.fault_schedule import Fault, Plan
from azr_async.config import Config
from azr_async.faults.inflict import Done
from azr_async.programs.commandline import load, parse
from azr_async.programs.fault_run import Inflicted, Story, is_named, is_noticed, last_words, silence_seconds
from azr_async.programs.fault_table import inflicted, report, table, target_kind
from azr_async.programs.faults import RUN_OPTIONS

KILL = Fault(kind="kill", target="inference-1", step=3, after_seconds=0.0)
DROP = Fault(kind="drop", target="inference-0-jobs from selfplay", step=4, after_seconds=0.0)


def story(violations: list[str]) -> Story:
    plan = Plan(number=4, seed=1, workers=2, ranks=1, max_lag=0, faults=(KILL, DROP))
    made = Story(plan, Path("run-004"), violations=violations, attempts=2)
    made.inflicted = [
        Inflicted(KILL, Done("process 1"), step=3, outcome="went on"),
        Inflicted(DROP, Done(), step=4),
    ]
    return made


def test_targets_are_named_without_their_numbers() -> None:
    assert target_kind("inference-1") == "inference"
    assert target_kind("inference-0-jobs from selfplay") == "inference-jobs"
    assert target_kind("selfplay-results from inference-1") == "selfplay-results"


def test_only_faults_that_hit_something_are_inflicted() -> None:
    stories = [story([]), story(["lost"])]
    assert inflicted(stories) == 2
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(stories))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["kill", "inference", "2", "2"] in rows
    assert ["drop", "inference-jobs", "0", "2"] in rows


def test_the_report_is_json_and_counts_violations() -> None:
    told = json.loads(json.dumps(report([story([]), story(["lost"])], seed=3, arguments=["--seed", "3"])))
    assert (told["violations"], told["inflicted"], told["hangs"], told["seed"]) == (1, 2, 0, 3)
    assert [fault["outcome"] for fault in told["runs"][0]["faults"]] == ["went on", "missed"]
    assert told["versions"].keys() >= {"python", "torch", "azr_async"}


def test_a_hang_is_longer_than_every_deadline_of_the_configuration() -> None:
    for config in (Config(), load(parse([word for pair in RUN_OPTIONS.items() for word in pair]))):
        wires, silence = config.wires, silence_seconds(config)
        assert silence > 2 * (wires.start_seconds + wires.step_seconds) + wires.stop_seconds
        assert silence > config.learner.step_seconds + config.checkpoint.write_seconds + wires.start_seconds


@pytest.mark.parametrize(
    ("error", "is_good"),
    [
        ("inference-1 failed: out of memory.\nIts log: runs/x/logs/inference-1.log", True),
        ("The run failed: learner-0 was lost (killed by SIGKILL). The logs are in runs/x/logs.", True),
        ("Something went wrong. The logs are in runs/x/logs.", False),
        ("selfplay did not answer.", False),
        ("", False),
    ],
)
def test_an_error_names_a_process_and_a_log(error: str, is_good: bool) -> None:
    assert is_named(error) is is_good


def test_an_error_is_named_however_long_the_lines_of_the_log_are() -> None:
    log = [f"    WARNING {'what was said ' * 60}{number}" for number in range(10)]
    report = ["learner-0 ended with exit status 1.", "Last lines of its log, runs/x/logs/learner-0.log:", *log]
    said = last_words("\n".join(["step 1/60", *report, "", "Go on with: python run.py --resume runs/x"]))
    assert is_named(said)
    assert said.startswith("learner-0 ended")


def test_a_changed_message_is_noticed_when_a_log_tells_of_it() -> None:
    assert is_noticed(damage("results", 7, "inference-0", "selfplay"))
    assert is_noticed("channel jobs has refused 4 messages, the last from inference-0: no such kind")
    assert not is_noticed("inference-0 was lost and is started again; a refused order; checksum of the weights: 3")
