"""What people type, what wins, and what they are told when it is wrong."""

import resource
import shutil
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis.strategies import sampled_from

from azr_async.__main__ import TOOLS
from azr_async.__main__ import main as tools_main
from azr_async.config import Config
from azr_async.errors import AzrError, ConfigError
from azr_async.programs.commandline import SHORT_NAMES, load, main, parse
from azr_async.programs.folders import claimed_run_dir
from azr_async.programs.preflight import Resumed, check
from azr_async.programs.settings_help import setting_names
from azr_async.programs.summary import how_to_go_on

ROOT = Path(__file__).parents[2]


def loaded(*arguments: str) -> Config:
    return load(parse(arguments))


def complaint(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*arguments)
    return str(caught.value)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("run: {steps: 7, seed: 5}\nflow:\n  max_lag: 4\n")
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(preset: Path) -> None:
    config = loaded("--config", str(preset), "--run.steps", "9")
    assert (config.run.steps, config.run.seed, config.flow.max_lag) == (9, 5, 4)
    assert config.learner == Config().learner


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--max-lag", "0"], "flow.max_lag", 0),
        (["--max_lag=0"], "flow.max_lag", 0),
        (["--flow.max-lag", "0"], "flow.max_lag", 0),
        (["--flow.max_lag=0"], "flow.max_lag", 0),
        (["--model", "some/model"], "model.path", "some/model"),
        (["--control.shuffle-rewards", "true"], "control.shuffle_rewards", True),
        (["--reward.proposer-extreme", "-0.5"], "reward.proposer_extreme", -0.5),
        (["--flow.tasks", "deduction,abduction"], "flow.tasks", ("deduction", "abduction")),
        (["--flow.tasks=[deduction]"], "flow.tasks", ("deduction",)),
        (["--learner.betas", "0.9,0.99"], "learner.betas", (0.9, 0.99)),
        (["--library.seed-file", "null"], "library.seed_file", None),
        (["--library.seed-file", "tasks.jsonl"], "library.seed_file", Path("tasks.jsonl")),
        (["--learner.learning-rate", "1e-6"], "learner.learning_rate", 1e-6),
        (["--inference-workers", "2", "--learner-ranks", "2"], "placement.learner_ranks", 2),
    ],
)
def test_a_setting_can_be_typed_in_each_of_its_forms(arguments: list[str], name: str, value: object) -> None:
    section, field = name.split(".")
    assert getattr(getattr(loaded(*arguments), section), field) == value


@given(name=sampled_from(setting_names()))
def test_every_setting_has_its_dotted_name_on_the_command_line(name: str) -> None:
    section, field = name.split(".")
    value = Config().model_dump(mode="json")[section][field]
    text = ",".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
    assert loaded(f"--{name.replace('_', '-')}={text}") == Config()


def test_every_problem_is_told_at_once_each_at_its_place(preset: Path) -> None:
    preset.write_text("run: {steps: many}\nlearner: {clip_hgih: 1}\nengine: 3\n")
    told = complaint("--config", str(preset), "--seed", "-1", "--max-lag", "x", "--solve.trained-attempts", "9")
    assert told.split("\n") == [
        f"{preset}: 3 settings need attention",
        "  run.steps = many: needs a whole number, 1 or more (default 120).",
        "  engine = 3: engine is a section; write its settings under it, indented.",
        "  learner.clip_hgih is not a setting. Did you mean learner.clip_high?",
        "command line: 3 settings need attention",
        "  --seed = -1: needs a whole number, 0 or more (default 1).",
        "  --max-lag = x: needs a whole number, 0 or more or auto (default 2).",
        "  solve: trained_attempts = 9 but only 8 attempts are sampled. Lower trained_attempts to 8 or raise attempts.",
    ]


def test_a_combination_is_told_where_one_of_its_settings_was_given(preset: Path) -> None:
    assert complaint("--config", str(preset), "--learner.objective", "none").startswith("command line: 1 setting")
    preset.write_text("learner: {objective: none}\n")
    assert complaint("--config", str(preset), "--seed", "3").startswith(f"{preset}: 1 setting")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--learner.clip-hgih", "3"], "--learner.clip-hgih is not an option. Did you mean --learner.clip-high?"),
        (["--max-lagg=3"], "--max-lagg is not an option. Did you mean --max-lag?"),
        (["--flow.learning-rate", "3"], "Did you mean --learner.learning-rate?"),
        (["--qqq"], "`python run.py --help` lists them all."),
        (["train"], "'train' stands alone."),
        (["--max-lag"], "--flow.max-lag: expected one argument."),
        (["--dry-run=yes"], "--dry-run"),
    ],
)
def test_a_typing_mistake_is_answered_with_a_way_out(arguments: list[str], told: str) -> None:
    assert told in complaint(*arguments)


def test_abbreviations_are_not_guessed() -> None:
    assert "--steps" in complaint("--step", "3")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("flow: {\nrun: 3", "line 2, column 7: "),
        ("a: b: c", "line 1, column 5: "),
        ("- 1\n- 2", "holds no sections"),
        ("3", "holds no sections"),
        ("\x00", "is not YAML"),
    ],
)
def test_an_unreadable_file_is_told_with_the_line(preset: Path, text: str, told: str) -> None:
    preset.write_text(text)
    assert complaint("--config", str(preset)).startswith(str(preset))
    assert told in complaint("--config", str(preset))


def test_a_missing_or_binary_file_is_told(preset: Path, tmp_path: Path) -> None:
    preset.write_bytes(b"\xff\xfe\x00")
    assert "is not a text file" in complaint("--config", str(preset))
    assert "No such file" in complaint("--config", str(tmp_path / "none.yaml"))
    assert "Is a directory" in complaint("--config", str(tmp_path))


def test_an_empty_file_changes_nothing(preset: Path) -> None:
    preset.write_text("# nothing\n")
    assert loaded("--config", str(preset)) == Config()


def test_help_teaches_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], env={}) == 0
    text = capsys.readouterr().out
    missing = [name for name in setting_names() if f"--{name.replace('_', '-')}" not in text]
    assert missing == []
    assert all(short in text for short in SHORT_NAMES)
    assert text.index("Examples") < text.index("--run.steps")


def test_a_dry_run_shows_settings_and_placement_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--inference-gpus", "4", "--train-gpus", "4", "--steps", "9"], env={}) == 0
    settings, _, placement = capsys.readouterr().out.partition("\n\n")
    assert yaml.safe_load(settings)["run"]["steps"] == 9
    assert "cuda:7" in placement
    assert "Nothing was started." in placement
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_message_on_stderr_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stepz", "3"], env={}) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 2)


def test_more_gpus_than_there_are_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inference-gpus", "400", "--train-gpus", "400"], env={}) == 2
    assert "need 800, but this machine has" in capsys.readouterr().err


def test_everything_that_is_missing_on_this_machine_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    config = loaded(
        "--model", "/no/such/model", "--library.seed-file", "/no/tasks.jsonl", "--evaluation.suite", "/no/suite.jsonl"
    )
    with pytest.raises(ConfigError) as caught:
        check(config, output=tmp_path / "full", resume=None)
    starts = [line.split(":")[0] for line in str(caught.value).split("\n")]
    assert starts == ["model.path", "library.seed_file", "evaluation.suite", "--output"]


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check(loaded("--model", str(tmp_path)), output=None, resume=None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "Qwen/Qwen2.5-7B"], "compact is the starter's language"),
        (["--model.dialogue", "azr-base"], "the starter speaks only compact"),
        (["--model", "FOLDER"], "does not have"),
        (["--model", "FOLDER", "--model.dialogue", "azr-chat"], "has no chat template"),
    ],
)
def test_a_language_that_the_tokenizer_cannot_speak_is_told(arguments: list[str], told: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    config = loaded(*(text.replace("FOLDER", str(tmp_path)) for text in arguments))
    with pytest.raises(ConfigError, match=told):
        check(config, output=None, resume=None)


def test_the_starter_can_be_continued_from_any_folder() -> None:
    folder = ROOT / "azr_async" / "starter" / "checkpoint"
    assert check(loaded("--model", str(folder)), output=None, resume=None) is None


def test_a_port_in_use_is_told_by_its_number() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} "):
            check(loaded("--weights.port", str(port)), output=None, resume=None)


def test_a_used_wire_port_is_told_with_the_range() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port .*\b{port}\b.* of {port - 3} to {port + 14} is in use"):
            check(loaded("--wires.transport", "tcp", f"--wires.base-port={port - 3}"), output=None, resume=None)


def test_resuming_from_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(AzrError, match="no complete checkpoint"):
        check(Config(), output=None, resume=tmp_path)
    with pytest.raises(AzrError, match="no checkpoint or run folder"):
        check(Config(), output=None, resume=tmp_path / "checkpoints" / "step-000020")


@pytest.mark.parametrize("left", ["", '{"step": 1}\n'])
def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_with_its_tasks(tmp_path: Path, left: str) -> None:
    (tmp_path / "journal.sqlite").touch()
    (tmp_path / "metrics.jsonl").write_text(left)
    assert check(Config(), output=None, resume=tmp_path) == Resumed(checkpoint=None, step=-1, run_dir=tmp_path)


def test_a_run_that_has_lost_its_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(AzrError, match="no complete checkpoint"):
        check(Config(), output=None, resume=tmp_path)


def test_a_damaged_line_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").touch()
    (tmp_path / "metrics.jsonl").write_text('{"st\x00\n', encoding="utf-8")
    with pytest.raises(AzrError, match="no complete checkpoint"):
        check(Config(), output=None, resume=tmp_path)


def test_a_run_that_began_with_a_checkpoint_of_another_folder_goes_on_from_that(tmp_path: Path) -> None:
    """Killed before its own first checkpoint, and even before its first line."""
    checkpoint, branch = tmp_path / "kept" / "step-000005", tmp_path / "branch"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {}}')
    claimed_run_dir(branch, Config(), checkpoint=checkpoint).close()
    (branch / "journal.sqlite").touch()
    assert check(Config(), output=None, resume=branch) == Resumed(checkpoint=checkpoint, step=5, run_dir=branch)
    assert how_to_go_on(branch) == f"Go on with: python run.py --resume {branch}"
    shutil.rmtree(checkpoint)
    with pytest.raises(AzrError, match="step-000005"):
        check(Config(), output=None, resume=branch)


@pytest.mark.parametrize("left", [["logs"], ["config.yaml", "logs", "wires"]])
def test_the_folder_of_a_run_that_was_killed_at_once_can_be_used_again(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).touch()
    check(Config(), output=tmp_path, resume=None)


def test_a_damaged_checkpoint_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "step-000020"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": 1, "files": {"config.json": {"bytes": 2, "sha256": "0"}}}')
    (folder / "config.json").write_text("{}")
    (tmp_path / "config.yaml").touch()
    assert main(["--dry-run", "--resume", str(tmp_path)], env={}) == 2
    assert f"{folder}/config.json is damaged" in capsys.readouterr().out
    assert main(["--resume", str(tmp_path)], env={}) == 2
    assert f"{folder}/config.json is damaged" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {steps: 77, seed: 5}\n")
    checkpoint = tmp_path / "checkpoints" / "step-000020"
    checkpoint.mkdir(parents=True)
    assert loaded("--resume", str(tmp_path)).run.steps == 77
    assert loaded("--resume", str(checkpoint), "--seed", "6").run.steps == 77


def test_a_checkpoint_away_from_its_run_needs_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "copied" / "step-000020").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("run: {steps: 77}\n")  # of whatever is two folders up
    assert "Say which with --config." in complaint("--resume", str(tmp_path / "copied" / "step-000020"))
    config = loaded("--resume", str(tmp_path / "copied" / "step-000020"), "--config", str(tmp_path / "config.yaml"))
    assert config.run.steps == 77


def test_another_model_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert "--model and --resume exclude each other" in complaint("--resume", str(tmp_path), "--model", "some/model")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--weights.port", "70000"], "from 0 to 65535"),
        (["--wires.transport", "tcp", "--wires.base-port", "65000", "--inference-workers", "300"], "Lower wires.base"),
        (["--wires.heartbeat-seconds", "inf"], "needs a number, above 0"),
        (["--output", LONG], "cannot be written: File name too long. Choose another folder"),
        (["--output", "/proc/x/y"], "cannot be written: "),
        (["--model", LONG], "there is no folder"),
        (["--model", "~nobody-of-that-name/model/x"], "there is no folder"),
        (["--resume", LONG], "there is no checkpoint or run folder"),
        (["--config", LONG], "File name too long"),
        (["--evaluation.suite", LONG], "there is no file"),
        (["--library.seed-file", LONG], "there is no file"),
        (["--telemetry.trackers", "trackio"], "pip install trackio"),
    ],
)
def test_a_mistake_is_told_in_words_and_with_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments, env={}) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ('model: {path: "a\\0b"}', "there is no folder 'a"),
        ("1: {steps: 3}", "1 is not the name of a section or setting"),
        ("run: {true: 3}", "True is not the name of a section or setting"),
    ],
)
def test_an_odd_file_is_told_in_words(preset: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset.write_text(text)
    assert main(["--config", str(preset)], env={}) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--library.seed-file", "--evaluation.suite"])
@pytest.mark.parametrize("content", [b"{}", b"no json", b"\xff\xfe", b"[1]"])
def test_a_file_that_holds_no_tasks_is_told_before_anything_starts(option: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{option[2:].replace('-', '_')}: .*{path}"):
        check(loaded(option, str(path)), output=None, resume=None)


def test_a_hub_id_that_cannot_be_had_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="there is no folder a/b here; taken for a hub id, it cannot be fetched"):
        check(loaded("--model", "a/b", "--model.dialogue", "azr-base"), output=None, resume=None)


@pytest.mark.parametrize("preset_name", ["azr-official.yaml", "azr-async-7b.yaml", "starter-cpu.yaml"])
def test_a_preset_can_be_looked_at_on_a_machine_that_cannot_run_it(
    preset_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["--config", str(ROOT / "configs" / preset_name), "--dry-run"], env={}) == 0
    assert "learner-0" in capsys.readouterr().out


def test_the_folder_of_a_run_without_steps_can_be_used_again(tmp_path: Path) -> None:
    for name in ("config.yaml", "journal.sqlite", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()
    assert check(Config(), output=tmp_path, resume=None) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match="is not an empty folder"):
        check(Config(), output=tmp_path, resume=None)


def test_a_dry_run_tells_what_stands_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--model", "/no/such/model"], env={}) == 2
    assert "It could not start: model.path: there is no folder /no/such/model." in capsys.readouterr().out


def test_ctrl_c_while_loading_is_quiet() -> None:
    process = subprocess.Popen([sys.executable, "-v", "run.py", "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # -v tells what is being imported
        if "azr_async.config" in line or "pydantic" in line:
            break
    process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.wait(timeout=30) in (130, 120)  # 120: nobody read the last of what -v says


def test_a_full_disk_is_told_before_anything_starts(tmp_path: Path) -> None:
    limit_bytes = 1000  # config.yaml is longer
    done = subprocess.run(
        [sys.executable, "run.py", "--output", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"the run directory {tmp_path / 'run'} cannot be written: ")
    assert done.stderr.count("\n") == 1


def test_unknown_options_and_wrong_values_are_told_together() -> None:
    text = complaint("--learner.clip-hgih", "3", "--max-lag", "x", "--steps", "0")
    assert text.startswith("command line: 3 settings need attention")
    assert all(part in text for part in ("--learner.clip-high?", "--max-lag = x", "--steps = 0"))


def test_an_unknown_tool_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert tools_main(["executee"]) == 2
    assert "Did you mean execute?" in capsys.readouterr().err


def test_the_tools_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tools_main([]) == 0
    text = capsys.readouterr().out
    assert [tool for tool in TOOLS if tool not in text] == []


@pytest.mark.parametrize("tool", TOOLS)
def test_every_listed_tool_is_there(tool: str) -> None:
    assert callable(import_module(f"azr_async.programs.{tool}").main)
