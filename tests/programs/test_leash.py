"""A program on a leash ends with its launcher, even while it is still importing."""

import os
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys, time; print(*sys.argv[1:], flush=True); time.sleep(600)"
LAUNCHER = """
import os, subprocess, sys, time
leash = [sys.executable, "-m", "azr_async.programs.leash", str(os.getpid()), "a_program", "--index", "3"]
with subprocess.Popen(leash, stdout=subprocess.PIPE, text=True) as program:
    print(program.pid, program.stdout.readline(), flush=True)
    time.sleep(600)
"""


def test_it_dies_with_its_launcher_and_gets_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "a_program.py").write_text(PROGRAM)
    environment = dict(os.environ) | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=environment) as one:
        assert one.stdout is not None
        pid, *arguments = one.stdout.readline().split()
        assert arguments == ["--index", "3"]
        program = os.pidfd_open(int(pid))
        try:
            one.kill()
            assert select.select([program], [], [], 30.0)[0]  # it is over
        finally:
            os.close(program)


def test_it_does_not_start_without_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "a_program.py").write_text("raise SystemExit('it was started')")
    done = subprocess.run(
        [sys.executable, "-m", "azr_async.programs.leash", "4194305", "a_program"],  # more than a pid can be
        env=dict(os.environ) | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60.0,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("a_program: the launcher of this run is gone.")
