"""A short schedule of faults over real runs: nothing is lost, nothing is trained twice, nothing hangs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from azr_async.programs import faults
from azr_async.programs.wiring import EXIT_USAGE

ROOT = Path(__file__).parents[2]


def test_a_run_with_a_few_faults_ends_trained_and_breaks_nothing(tmp_path: Path) -> None:
    output = tmp_path / "faults"
    command = (*("--runs", "1", "--per-run", "3", "--steps", "30", "--seed", "5"), "--kinds", "kill,stop,group")
    done = subprocess.run(
        [sys.executable, "-m", "azr_async", "faults", *command, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280.0,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((output / "faults.json").read_text())
    assert report["violations"] == report["hangs"] == 0
    assert report["inflicted"] >= 2
    assert report["seed"] == 5
    assert "0 violations" in done.stdout
    assert not (output / "run-000").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--flow.max-lagg", "1"], "flow.max-lagg is not an option"),
        (["--run.device"], "pairs"),
        (["--flow.max-lag", "1"], "every run draws its own"),
        (["--placement.inference_workers=3"], "every run draws its own"),
        (["--checkpoint.every-steps", "0"], "could not be continued"),
        (["--output", "{here}"], "is not empty"),
    ],
)
def test_what_cannot_be_started_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    (tmp_path / "something").touch()
    assert faults.main([word.format(here=tmp_path) for word in arguments]) == EXIT_USAGE
    assert complaint in capsys.readouterr().err
