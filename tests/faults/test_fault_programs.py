"""What is done to the programs of a run from outside: to their view of the wires, clock, files and lives."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from azr_async.faults.inside import program_of
from azr_async.faults.processes import (
    is_alive,
    limit_file_size,
    processes_of,
    send,
    wait_until_gone,
)
from azr_async.faults.views import clock_trigger, prepare_site

WHAT_IT_SEES = """
import json, sys, time
from pathlib import Path
wires = Path(sys.argv[sys.argv.index("--wires") + 1])
(wires / "inference-0.failed").write_text("last words")
print(json.dumps([str(wires), (wires / "mine").read_text(), (wires / "launcher.pid").read_text(), time.time(),
    time.time_ns()]))
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Looks like a program of a run in `tmp_path`; writes into a file for ever."""
    write = "open(sys.argv[-1], 'ab', 0).write(bytes(1000)); time.sleep(0.01)"
    code = f"import sys, time\nprint(flush=True)\nwhile True:\n {write}"
    words = ["azr_async.programs.learner", "--rank", "1", "--run-dir", str(tmp_path), str(tmp_path / "file")]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # only now its command line is there to be read
    yield process
    process.kill()
    process.communicate()


def test_programs_are_told_apart_by_their_command() -> None:
    assert program_of(["python", "-m", "azr_async.programs.inference", "--index", "2", "--wires", "x"]) == "inference-2"
    assert program_of(["python", "-m", "azr_async.programs.selfplay", "--wires", "x"]) == "selfplay"
    assert program_of(["python", "-m", "azr_async.programs.judge", "--rank", "1"]) == ""


def test_a_program_finds_its_own_wires_and_the_launcher_its_last_words(tmp_path: Path) -> None:
    real, view = tmp_path / "real", tmp_path / "wires" / "inference-0"
    real.mkdir()
    view.mkdir(parents=True)
    (real / "launcher.pid").write_text("4711")
    (view / "mine").write_text("its own")
    prepare_site(tmp_path)
    clock_trigger(tmp_path, "inference-0").write_text("-7200")
    words = ["azr_async.programs.inference", "--index", "0", "--wires", str(real)]
    done = subprocess.run(
        [sys.executable, "-c", WHAT_IT_SEES, *words],
        env=dict(os.environ) | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        check=True,
        timeout=60.0,
    )
    wires, own, launcher, seconds, nanoseconds = json.loads(done.stdout)
    assert wires.startswith("/proc/self/fd/")
    assert (own, launcher) == ("its own", "4711")
    assert (real / "inference-0.failed").read_text() == "last words"
    assert time.time() - seconds == pytest.approx(7200.0, abs=60.0)
    assert nanoseconds / 1e9 == pytest.approx(seconds, abs=1.0)


def test_a_process_of_a_run_is_found_by_its_folder_and_known_again(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    (found,) = processes_of(tmp_path)
    assert (found.pid, found.name) == (sleeper.pid, "learner-1")
    assert is_alive(found)
    assert send(found, signal.SIGKILL)
    sleeper.wait()
    assert not is_alive(found)
    assert not send(found, signal.SIGKILL)
    assert processes_of(tmp_path) == []


def test_a_disk_is_full_until_it_is_lifted(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    (found,) = processes_of(tmp_path)
    assert limit_file_size(found, 4096)
    assert resource.prlimit(found.pid, resource.RLIMIT_FSIZE)[0] == 4096
    assert sleeper.stderr is not None
    assert b"File too large" in sleeper.stderr.read()
    sleeper.wait()
    assert not limit_file_size(found, -1)


def test_a_lifted_limit_is_the_one_of_before(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    (found,) = processes_of(tmp_path)
    before = resource.prlimit(found.pid, resource.RLIMIT_FSIZE)
    limit_file_size(found, 2**40)
    assert limit_file_size(found, -1)
    assert resource.prlimit(found.pid, resource.RLIMIT_FSIZE) == before
    assert sleeper.poll() is None


async def test_what_is_left_of_a_run_is_told(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    assert [one.pid for one in await wait_until_gone(tmp_path, within_seconds=0.1)] == [sleeper.pid]
    sleeper.kill()
    assert await wait_until_gone(tmp_path, within_seconds=10.0) == []
