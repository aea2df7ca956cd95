"""Addresses of wires, and the configuration that every program reads."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from azr_async.config import Config
from azr_async.errors import AzrError, ConfigError, PeerVanished
from azr_async.programs.folders import claimed_run_dir
from azr_async.programs.wiring import (
    LAUNCHER_PID_FILE,
    Reporter,
    allow_descriptors,
    endpoint,
    endpoint_names,
    load_run_config,
    read_last_words,
    root_causes,
)

ROOT = Path(__file__).parents[2]


@given(workers=integers(1, 200), transport=sampled_from(["ipc", "tcp"]))
def test_no_two_wires_share_an_address(workers: int, transport: str) -> None:
    config = Config.model_validate({"placement": {"inference_workers": workers}, "wires": {"transport": transport}})
    names = endpoint_names(config)
    assert len({endpoint(config, Path("/tmp/azr-x"), name) for name in names}) == len(names) == 5 + 2 * workers


def test_wires_are_socket_files_or_loopback_ports() -> None:
    tcp = Config.model_validate({"wires": {"transport": "tcp", "base_port": 5000}})
    assert endpoint(Config(), Path("/tmp/w"), "inference-3-jobs") == "ipc:///tmp/w/inference-3-jobs"
    assert endpoint(tcp, Path("/tmp/w"), "learner-batches") == "tcp://127.0.0.1:5003"


def test_a_programs_limit_of_descriptors_is_lifted_as_far_as_the_host_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_descriptors()
        lifted, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert lifted == (min(65_536, most) if most > 0 else 65_536)
    assert most == before[1]


@pytest.mark.parametrize("name", ["", "learner", "inference-x-jobs", "inference-1-pull", "../launcher"])
def test_an_unknown_wire_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a wire"):
        endpoint(Config(), Path("/tmp"), name)


def test_a_path_that_no_socket_can_have_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"--wires\.transport tcp"):
        endpoint(Config(), Path("/tmp") / ("long" * 30), "launcher")


def test_programs_read_the_configuration_that_the_launcher_wrote(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"steps": 3}, "library": {"seed_file": "tasks.jsonl"}})
    with claimed_run_dir(tmp_path, config, None):
        assert load_run_config(tmp_path) == config


@pytest.mark.parametrize("text", ["run: {steps: many}", "run: [", "nonsense: 1"])
def test_a_damaged_configuration_is_told_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path / "config.yaml")):
        load_run_config(tmp_path)


async def test_only_the_newest_report_is_kept() -> None:
    reporter = Reporter("selfplay")
    reporter.report("seeding", 1, 64)
    reporter.report("seeding", 2, 64)
    assert (await reporter.next()).done == 2


def test_causes_come_before_consequences_however_deep_they_are() -> None:
    cause = AzrError("no oil")
    error = ExceptionGroup("outer", [PeerVanished("silent"), ExceptionGroup("inner", [cause])])
    assert root_causes(error)[0] is cause


def test_a_program_that_had_no_time_to_speak_left_no_words(tmp_path: Path) -> None:
    (tmp_path / "learner-0.failed").write_text('{"message": "half')
    assert read_last_words(tmp_path, "learner-0") is None
    assert read_last_words(tmp_path, "selfplay") is None


@pytest.mark.parametrize("left", ["", "1"])
def test_a_program_without_its_launcher_does_not_start(tmp_path: Path, left: str) -> None:
    if left:  # of a launcher that is not its parent
        (tmp_path / LAUNCHER_PID_FILE).write_text(left)
    program = (
        "import sys; from pathlib import Path; from azr_async.config import Config\n"
        "from azr_async.programs.wiring import program_main\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "async def main(reporter): (folder / 'started').touch()\n"
        "sys.exit(program_main('selfplay', folder, folder, Config(), main))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the launcher of this run is gone" in done.stderr
    assert not (tmp_path / "started").exists()
