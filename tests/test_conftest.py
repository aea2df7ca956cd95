"""Which tests share a process."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, WHOLE_RUNS

TEST = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(4))
def test_nothing(number):
    with pathlib.Path("who").open("a") as file:
        file.write(f"{pathlib.Path(__file__).stem} {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


def test_files_stay_together_and_whole_runs_take_turns(tmp_path: Path) -> None:
    """With pytest's own scheduling, which reads none of our names, two files would be two processes' work."""
    whole, other = ["test_resume", "test_supervision", "test_end_to_end"], ["test_a", "test_b", "test_c"]
    assert {f"tests/{name}.py" for name in whole} <= WHOLE_RUNS
    assert all((ROOT / file).is_file() for file in WHOLE_RUNS)
    (tmp_path / "tests").mkdir()
    for name in whole + other:
        (tmp_path / "tests" / f"{name}.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -n 2 --dist=loadscope --import-mode=importlib\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "tests"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        command, cwd=tmp_path, env=own | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    who = [line.split() for line in (tmp_path / "who").read_text().splitlines()]
    assert len(who) == 4 * len(whole + other)
    workers = {name: {worker for file, worker in who if file == name} for name in whole + other}
    assert all(len(workers[name]) == 1 for name in other)
    assert len(set.union(*(workers[name] for name in whole))) == 1
    assert len(set.union(*workers.values())) == 2
