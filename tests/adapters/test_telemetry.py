"""Metrics files hold complete lines only; trackers get the same numbers."""

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from azr_async.adapters.telemetry import JsonLines, Trackers, flattened, nested, truncate_after
from azr_async.errors import AzrError, ConfigError


def lines_of(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.write({"step": 1, "lag": {"max": 2}})
        assert lines_of(lines.path) == [{"step": 1, "lag": {"max": 2}}]
        lines.write({"step": 2})
        assert len(lines_of(lines.path)) == 2


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.write({"step": 1, "loss": math.nan, "reward": {"solve_deduction": math.inf}, "tasks": ("deduction",)})
    assert lines_of(lines.path) == [
        {"step": 1, "loss": None, "reward": {"solve_deduction": None}, "tasks": ["deduction"]}
    ]


def test_opening_again_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with JsonLines(tmp_path / "metrics.jsonl") as lines:
            lines.write({"step": step})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    truncate_after(tmp_path / "missing.jsonl", 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def limit_files_to_100_bytes() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


WRITE_TOO_MUCH = """
import sys
from pathlib import Path
from azr_async.adapters.telemetry import JsonLines
from azr_async.errors import AzrError
with JsonLines(Path(sys.argv[1])) as lines:
    lines.write({"step": 1, "text": "x" * 50})
    try:
        lines.write({"step": 2, "text": "x" * 50})
    except AzrError as error:
        print(error)
"""


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=limit_files_to_100_bytes,
    )
    assert done.stdout.startswith(f"the disk is full: {path} cannot grow. Free some space")
    assert [record["step"] for record in lines_of(path)] == [1]  # type: ignore[index]
    assert issubclass(AzrError, Exception)


def test_tensorboard_gets_the_numbers_under_their_path(tmp_path: Path) -> None:
    with Trackers(["tensorboard"], tmp_path) as trackers:
        trackers.log({"loss": 0.5, "reward": {"solve_deduction": 0.25, "solve_induction": None}}, step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "reward/solve_deduction"]
    assert [(event.step, event.value) for event in events.Scalars("reward/solve_deduction")] == [(3, 0.25)]


def test_no_trackers_is_fine(tmp_path: Path) -> None:
    with Trackers([], tmp_path) as trackers:
        trackers.log({"loss": 0.5}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_whose_package_is_missing_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"telemetry.trackers names nothing_like_it.*pip install nothing_like_it"):
        Trackers(["tensorboard", "nothing_like_it"], tmp_path)


def test_dotted_names_become_a_tree() -> None:
    assert nested({"tokens.trained": 5, "tokens.dropped": 1, "loss": 2.0, "a.b.c": 3}) == {
        "tokens": {"trained": 5, "dropped": 1},
        "loss": 2.0,
        "a": {"b": {"c": 3}},
    }


@given(
    flat=st.dictionaries(
        st.lists(st.sampled_from("abc"), min_size=3, max_size=3).map(".".join), st.floats(allow_nan=False), min_size=1
    )
)
def test_flattening_undoes_nesting(flat: dict[str, float]) -> None:
    finite = {name.replace(".", "/"): value for name, value in flat.items() if math.isfinite(value)}
    assert flattened(nested(flat)) == finite
