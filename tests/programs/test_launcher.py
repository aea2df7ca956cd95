"""The launcher on small real programs that end, die, hang and refuse to stop."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from azr_async.config import Config, WiresConfig
from azr_async.errors import ConfigError
from azr_async.programs.folders import WIRES_PREFIX, claimed_run_dir, private_wires_dir
from azr_async.programs.launcher import Crew
from azr_async.programs.supervision import back_off

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio, os, signal, subprocess, sys, time
from pathlib import Path
from azr_async.errors import EngineError, PeerVanished
from azr_async.programs.wiring import Reporter, load_run_config, program_main, program_parser

parser = program_parser("A program of a test.")
parser.add_argument("name")
arguments = parser.parse_args()
run_dir = arguments.run_dir

async def main(reporter: Reporter) -> None:
    reporter.report("working", 1, 3)
    (run_dir / f"{arguments.name}.pid").write_text(str(os.getpid()))
{body}

sys.exit(program_main(arguments.name, run_dir, arguments.wires, load_run_config(run_dir), main))
"""

LAUNCHER = """
import json, os, sys
from pathlib import Path
from azr_async.config import Config
from azr_async.programs.folders import claimed_run_dir, private_wires_dir
from azr_async.programs.launcher import run_programs
from azr_async.programs.supervision import ProgramSpec

run_dir, config = Path(sys.argv[1]), Config.model_validate(json.loads(sys.argv[2]))
with claimed_run_dir(run_dir, config, None), private_wires_dir() as wires_dir:
    (run_dir / "wires").write_text(str(wires_dir))
    specs = [
        ProgramSpec(
            name=path.stem,
            argv=(sys.executable, str(path), "--run-dir", str(run_dir), "--wires", str(wires_dir), path.stem),
            env={"PYTHONPATH": os.getcwd(), "PATH": os.environ["PATH"]},
            log_path=run_dir / "logs" / f"{path.stem}.log",
            ends_the_run=path.stem.startswith("learner"),
            is_told_to_stop=not path.stem.startswith("inference"),
            max_restarts=config.run.max_restarts if path.stem.startswith("inference") else 0,
        )
        for path in sorted((run_dir.parent / "programs").glob("*.py"))
    ]
    sys.exit(run_programs(specs, config, run_dir=run_dir, wires_dir=wires_dir))
"""

UNTIL_TOLD = "await reporter.stop_requested.wait()"
UNTIL_LEARNER_ENDED = """
while not (run_dir / "learner-0.ended").exists():
    await asyncio.sleep(0.02)
"""
LEARN = """
line = '{"step": 1, "wall_seconds": 1.5, "lag": {"mean": 0.5, "max": 1, "bound": 2}}'
(run_dir / "metrics.jsonl").write_text(line + chr(10))
(run_dir / "learner-0.ended").touch()
"""
FOREVER = "await asyncio.sleep(1000)"
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nawait asyncio.sleep(1000)"


class Run:
    """A launcher process over programs with the given bodies."""

    def __init__(self, folder: Path, bodies: dict[str, str], max_restarts: int, **wires: float) -> None:
        self.run_dir = folder / "run"
        (folder / "programs").mkdir()
        for name, body in bodies.items():
            text = PROGRAM.replace("{body}", textwrap.indent(body.strip(), "    "))
            (folder / "programs" / f"{name}.py").write_text(text)
        settings = json.dumps(
            {"run": {"max_restarts": max_restarts}, "wires": {"start_seconds": 30.0, "stop_seconds": 20.0, **wires}}
        )
        self.names = list(bodies)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(self.run_dir), settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_working(self) -> None:
        wait_until(lambda: len(list(self.run_dir.glob("*.pid"))) == len(self.names) or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=50)
        return self.process.returncode, out, err

    @property
    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.run_dir.glob("*.pid")]

    @property
    def wires_dir(self) -> Path:
        return Path((self.run_dir / "wires").read_text())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_run(bodies: dict[str, str], max_restarts: int = 0, **wires: float) -> Run:
        runs.append(Run(tmp_path, bodies, max_restarts, **wires))
        return runs[-1]

    yield start_run
    for run in runs:
        run.process.kill()
        run.process.communicate()


def test_a_run_ends_when_the_learner_has_and_tells_what_happened(start: Callable[..., Run]) -> None:
    run = start({"inference-0": UNTIL_LEARNER_ENDED, "learner-0": LEARN, "selfplay": UNTIL_LEARNER_ENDED})
    status, out, err = run.end()
    assert (status, err) == (0, "")
    assert "step 1/120" in out
    assert "Done: 1 steps" in out
    assert_nothing_is_left(run)


def test_a_program_that_serves_on_after_the_run_is_ended(start: Callable[..., Run]) -> None:
    run = start({"learner-0": LEARN, "selfplay": IGNORES_SIGTERM}, stop_seconds=0.5)
    status, _, _ = run.end()
    assert status == 0
    assert_nothing_is_left(run)


def test_a_failing_program_is_named_with_its_own_words_and_its_log(start: Callable[..., Run]) -> None:
    body = "raise EngineError('the engine has no oil. Pour some in.')"
    run = start({"inference-0": body, "learner-0": FOREVER, "selfplay": UNTIL_TOLD})
    status, _, err = run.end()
    assert status == 1
    assert (
        err
        == f"inference-0 failed: the engine has no oil. Pour some in.\nIts log: {run.run_dir}/logs/inference-0.log\n"
    )
    assert_nothing_is_left(run)


def test_a_bug_is_told_in_a_line_and_its_traceback_is_in_the_log(start: Callable[..., Run]) -> None:
    run = start({"learner-0": "{}['weights']", "selfplay": UNTIL_TOLD})
    status, _, err = run.end()
    assert status == 1
    assert "learner-0 failed: unexpected KeyError: 'weights'" in err
    assert "Traceback" not in err
    assert "Traceback" in (run.run_dir / "logs" / "learner-0.log").read_text()


def test_a_killed_program_is_named_with_the_signal_and_its_last_words(start: Callable[..., Run]) -> None:
    run = start({"learner-0": UNTIL_TOLD, "selfplay": "print('half a step done', flush=True)\n" + UNTIL_TOLD})
    run.wait_until_working()
    os.kill(int((run.run_dir / "selfplay.pid").read_text()), signal.SIGKILL)
    status, _, err = run.end()
    assert status == 1
    assert "selfplay was killed by SIGKILL" in err
    assert "half a step done" in err
    assert_nothing_is_left(run)


def test_the_cause_is_blamed_not_the_programs_that_fell_with_it(start: Callable[..., Run]) -> None:
    cause = "await asyncio.sleep(0.3)\ntry:\n    raise EngineError('out of oil. Pour.')\nfinally:\n    time.sleep(0.2)"
    falls = "raise PeerVanished('selfplay is silent. Look at its log.')"
    run = start({"learner-0": falls, "selfplay": cause})
    assert "selfplay failed: out of oil. Pour." in run.end()[2]


def test_a_program_that_ends_in_the_middle_of_the_run_is_missed(start: Callable[..., Run]) -> None:
    run = start({"learner-0": UNTIL_TOLD, "selfplay": "pass"}, stop_seconds=0.5)
    status, _, err = run.end()
    assert status == 1
    assert "selfplay ended while still needed" in err
    assert_nothing_is_left(run)


LEARN_ONCE_IT_WAS_STARTED_AGAIN = (
    """
while not (run_dir / "inference-0.again").exists():
    await asyncio.sleep(0.02)
"""
    + LEARN
)
FAIL_AT_FIRST = (
    """
if not (run_dir / "inference-0.began").exists():
    (run_dir / "inference-0.began").touch()
    {failure}
(run_dir / "inference-0.again").touch()
"""
    + UNTIL_LEARNER_ENDED
)
SHOW_THAT_IT_WORKS = LEARN.replace('(run_dir / "learner-0.ended").touch()', "")
UNTIL_IT_WORKS = """
    while not (run_dir / "metrics.jsonl").exists():
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.6)
    raise EngineError('out of oil. Pour.')
"""


def test_a_worker_that_is_killed_is_started_again_and_the_run_tells_of_it(start: Callable[..., Run]) -> None:
    failure = "os.kill(os.getpid(), signal.SIGKILL)"
    bodies = {
        "inference-0": FAIL_AT_FIRST.replace("{failure}", failure),
        "learner-0": LEARN_ONCE_IT_WAS_STARTED_AGAIN,
        "selfplay": UNTIL_LEARNER_ENDED,
    }
    run = start(bodies, max_restarts=3)
    status, out, err = run.end()
    assert (status, err) == (0, "")
    assert "inference-0 was killed by SIGKILL." in out
    assert "It starts again in 1 s (1 of 3 times)." in out
    assert "restarts inference-0 1 time" in out
    assert_nothing_is_left(run)


def test_a_worker_that_fails_while_the_run_goes_on_is_started_again(start: Callable[..., Run]) -> None:
    bodies = {
        "inference-0": FAIL_AT_FIRST.replace("{failure}", UNTIL_IT_WORKS.strip()),
        "learner-0": SHOW_THAT_IT_WORKS + LEARN_ONCE_IT_WAS_STARTED_AGAIN,
        "selfplay": UNTIL_LEARNER_ENDED,
    }
    run = start(bodies, max_restarts=3)
    status, out, err = run.end()
    assert (status, err) == (0, "")
    assert "inference-0 failed: out of oil. Pour. It starts again in 1 s (1 of 3 times)." in out
    log = (run.run_dir / "logs" / "inference-0.log").read_text()
    assert "out of oil" in log


def test_a_worker_that_fails_before_anything_was_trained_ends_the_run(start: Callable[..., Run]) -> None:
    body = "raise EngineError('the engine has no oil. Pour some in.')"
    run = start({"inference-0": body, "learner-0": FOREVER, "selfplay": UNTIL_TOLD}, max_restarts=3)
    status, _, err = run.end()
    assert status == 1
    assert err.startswith("inference-0 failed: the engine has no oil. Pour some in.\nIts log")
    assert_nothing_is_left(run)


def test_a_worker_that_is_lost_too_often_ends_the_run_by_name(start: Callable[..., Run]) -> None:
    bodies = {
        "inference-0": "os.kill(os.getpid(), signal.SIGKILL)",
        "learner-0": UNTIL_TOLD,
        "selfplay": UNTIL_TOLD,
    }
    run = start(bodies, max_restarts=1)
    status, _, err = run.end()
    assert status == 1
    assert "inference-0 was killed by SIGKILL" in err
    assert "It had been started again 1 time before." in err
    assert_nothing_is_left(run)


def test_a_run_that_is_stopped_does_not_wait_for_a_worker_that_rests(start: Callable[..., Run]) -> None:
    bodies = {
        "inference-0": "os.kill(os.getpid(), signal.SIGKILL)",
        "learner-0": UNTIL_TOLD + LEARN,
        "selfplay": UNTIL_LEARNER_ENDED,
    }
    run = start(bodies, max_restarts=9)
    run.wait_until_working()
    wait_until(lambda: not is_alive(int((run.run_dir / "inference-0.pid").read_text())))
    run.process.send_signal(signal.SIGINT)
    status, _, err = run.end()
    assert (status, err) == (130, "")
    assert_nothing_is_left(run)


def test_a_program_that_says_nothing_more_is_killed_and_named(start: Callable[..., Run]) -> None:
    hang = "await asyncio.sleep(0.5)\nos.kill(os.getpid(), signal.SIGSTOP)"
    run = start({"learner-0": hang, "selfplay": UNTIL_TOLD}, heartbeat_seconds=0.2, peer_timeout_seconds=3.0)
    status, _, err = run.end()
    assert status == 1
    assert "learner-0 had not answered for wires.peer_timeout_seconds, so it was killed." in err
    assert_nothing_is_left(run)


REPORT_UNTIL_GO = """
while not (run_dir / "go").exists():
    reporter.report("waiting")
    await asyncio.sleep(0.05)
await asyncio.sleep(4.5)
"""


def test_a_launcher_that_was_stopped_for_a_while_hears_of_its_programs_again(start: Callable[..., Run]) -> None:
    bodies = {"learner-0": REPORT_UNTIL_GO + LEARN, "selfplay": UNTIL_LEARNER_ENDED}
    run = start(bodies, heartbeat_seconds=0.2, peer_timeout_seconds=3.0)
    run.wait_until_working()
    run.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: "launcher at" in (run.run_dir / "logs" / "learner-0.log").read_text())
    run.process.send_signal(signal.SIGCONT)
    (run.run_dir / "go").touch()
    status, _, err = run.end()
    assert (status, err) == (0, "")


def test_the_rest_before_a_restart_grows_up_to_a_minute() -> None:
    assert [back_off(losses) for losses in (1, 2, 3, 7, 100)] == [1.0, 2.0, 4.0, 60.0, 60.0]


def test_ctrl_c_lets_the_step_finish_and_exits_130(start: Callable[..., Run]) -> None:
    finish = UNTIL_TOLD + "\nawait asyncio.sleep(0.3)\n(run_dir / 'finished').touch()" + LEARN
    run = start({"inference-0": UNTIL_LEARNER_ENDED, "learner-0": finish, "selfplay": UNTIL_TOLD})
    run.wait_until_working()
    run.process.send_signal(signal.SIGINT)
    status, out, err = run.end()
    assert (status, err) == (130, "")
    assert "finishing the step, writing a checkpoint; Ctrl-C again stops at once" in out
    assert "Stopped after step 1 of 120" in out
    assert (run.run_dir / "finished").exists()
    assert_nothing_is_left(run)


def test_a_learner_that_cannot_finish_in_time_is_killed(start: Callable[..., Run]) -> None:
    run = start({"learner-0": IGNORES_SIGTERM, "selfplay": UNTIL_TOLD}, stop_seconds=0.5)
    run.wait_until_working()
    run.process.send_signal(signal.SIGTERM)
    status, out, err = run.end()
    assert status == 130
    assert err.startswith("learner-0 did not finish and was killed: the last step was not saved.")
    assert "No checkpoint was written; the same command starts again." in out
    assert_nothing_is_left(run)


def test_a_learner_that_gives_up_after_its_time_is_told_as_unsaved(start: Callable[..., Run]) -> None:
    run = start({"learner-0": FOREVER, "selfplay": UNTIL_TOLD}, stop_seconds=0.5)
    run.wait_until_working()
    run.process.send_signal(signal.SIGINT)
    status, _, err = run.end()
    assert status == 130
    assert "learner-0 did not finish and was killed: the last step was not saved." in err


def test_a_learner_that_fails_while_it_saves_is_told_in_its_words(start: Callable[..., Run]) -> None:
    fails = UNTIL_TOLD + "\nraise EngineError('the disk is full. Free some space.')"
    run = start({"inference-0": UNTIL_TOLD, "learner-0": fails, "selfplay": UNTIL_TOLD})
    run.wait_until_working()
    run.process.send_signal(signal.SIGINT)
    status, out, err = run.end()
    assert status == 130
    assert err == (f"learner-0 failed: the disk is full. Free some space.\nIts log: {run.run_dir}/logs/learner-0.log\n")
    assert "nothing to save" not in out
    assert_nothing_is_left(run)


def test_a_second_ctrl_c_stops_at_once(start: Callable[..., Run]) -> None:
    run = start({"learner-0": UNTIL_TOLD + "\n(run_dir / 'told').touch()\n" + FOREVER}, stop_seconds=1000.0)
    run.wait_until_working()
    run.process.send_signal(signal.SIGINT)
    wait_until((run.run_dir / "told").exists)
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130
    assert_nothing_is_left(run)


def test_what_a_program_started_dies_with_it(start: Callable[..., Run]) -> None:
    child = "child = subprocess.Popen(['sleep', '1000'])\n(run_dir / 'child.pid').write_text(str(child.pid))\n"
    run = start({"learner-0": child + LEARN})
    assert run.end()[0] == 0
    assert_nothing_is_left(run)


def test_nothing_survives_the_launcher_being_killed(start: Callable[..., Run]) -> None:
    run = start({"inference-0": FOREVER, "learner-0": FOREVER, "selfplay": IGNORES_SIGTERM})
    run.wait_until_working()
    pids = run.pids
    run.process.kill()
    run.process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    with private_wires_dir():
        assert not run.wires_dir.exists()


def test_a_program_that_never_reports_fails_the_start(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start({"learner-0": "pass"}, start_seconds=1.0)
    (tmp_path / "programs" / "learner-0.py").write_text("import time\ntime.sleep(1000)\n")
    status, _, err = run.end()
    assert status == 1
    assert "learner-0 did not report within 1 s" in err


def test_a_run_goes_on_when_nobody_reads_its_output(start: Callable[..., Run]) -> None:
    run = start({"learner-0": "await asyncio.sleep(0.5)\n" + LEARN})
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert (run.process.wait(timeout=50), run.process.stderr and run.process.stderr.read()) == (0, "")
    assert_nothing_is_left(run)


def test_two_launchers_cannot_share_a_run_directory(tmp_path: Path) -> None:
    with claimed_run_dir(tmp_path, Config(), None), pytest.raises(Exception, match="another run is going on"):
        claimed_run_dir(tmp_path, Config(), None)


def test_the_socket_folder_is_private_and_goes_away() -> None:
    with private_wires_dir() as wires_dir:
        assert wires_dir.name.startswith(WIRES_PREFIX)
        assert wires_dir.stat().st_mode & 0o777 == 0o700
    assert not wires_dir.exists()


def test_a_run_that_branches_off_takes_its_history_along(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"step": 1}\n')
    with closing(sqlite3.connect(old / "journal.sqlite")) as journal:
        journal.execute("PRAGMA journal_mode = WAL")
        journal.execute("CREATE TABLE tasks (name TEXT)")
        journal.execute("INSERT INTO tasks VALUES ('double')")
        journal.commit()  # it is in the write-ahead log now, and the old run still has it open
        claimed_run_dir(new, Config(), old).close()
    assert (new / "metrics.jsonl").read_text() == '{"step": 1}\n'
    with closing(sqlite3.connect(new / "journal.sqlite")) as journal:
        assert journal.execute("SELECT name FROM tasks").fetchall() == [("double",)]


def test_the_settings_of_a_run_are_whole_at_every_moment(tmp_path: Path) -> None:
    claimed_run_dir(tmp_path, Config(), None).close()
    before = (tmp_path / "config.yaml").read_text()
    (tmp_path / "logs" / "config.yaml.draft").mkdir()  # cannot be written
    with pytest.raises(ConfigError, match="cannot be written"):
        claimed_run_dir(tmp_path, Config.model_validate({"run": {"seed": 9}}), None)
    (tmp_path / "logs" / "config.yaml.draft").rmdir()
    assert (tmp_path / "config.yaml").read_text() == before
    claimed_run_dir(tmp_path, Config(), None).close()  # nobody holds it


def test_every_process_carries_the_run_directory_in_its_command_line(tmp_path: Path) -> None:
    crew = Crew(Config(wires=WiresConfig()), run_dir=tmp_path, wires_dir=tmp_path / "w", checkpoint=None, env={})
    specs = crew.specs()
    assert [spec.name for spec in specs] == ["inference-0", "selfplay", "learner-0"]
    assert all(str(tmp_path) in spec.argv for spec in specs)
    assert [spec.max_restarts for spec in specs] == [3, 3, 0]


def assert_nothing_is_left(run: Run) -> None:
    assert run.pids
    assert not [pid for pid in run.pids if is_alive(pid)]
    assert not run.wires_dir.exists()


def wait_until(condition: Callable[[], object]) -> None:
    """Other processes are waited for, and they cannot wake this one."""
    give_up_at = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
