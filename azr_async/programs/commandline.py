"""From what the user typed to one valid `Config`, or to one message that names every problem and the way out.

Precedence: command line > `--config` file > the resumed run's `config.yaml` > the defaults (the CPU starter).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Never

from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource
from rich.console import Console

from azr_async.config import Config
from azr_async.errors import AzrError, ConfigError
from azr_async.programs import files, launcher, preflight
from azr_async.programs.presets import Tree, merged, read_tree
from azr_async.programs.settings_help import expected, print_help, setting_names
from azr_async.programs.wiring import CONFIG_FILE, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE

SHORT_NAMES: Final[Mapping[str, str]] = {
    "--inference-gpus": "placement.inference_gpus",
    "--train-gpus": "placement.train_gpus",
    "--inference-workers": "placement.inference_workers",
    "--learner-ranks": "placement.learner_ranks",
    "--placement": "placement.mode",
    "--model": "model.path",
    "--engine": "engine.kind",
    "--max-lag": "flow.max_lag",
    "--steps": "run.steps",
    "--seed": "run.seed",
    "--max-restarts": "run.max_restarts",
    "--keep-checkpoints": "checkpoint.keep",
}
"""Settings that people type often; each is the same as `--section.field`."""

PLAIN_OPTIONS: Final = ("--config", "--output", "--resume", "--dry-run", "--help")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user typed, taken apart."""

    overrides: Tree
    """Settings from the command line, section by section, not yet validated."""
    config_file: Path | None
    output: Path | None
    resume: Path | None
    is_dry_run: bool
    wants_help: bool
    problems: tuple[str, ...]
    """Options that do not exist; `load` tells them with everything else that is wrong."""


def main(arguments: Sequence[str], *, env: Mapping[str, str]) -> int:
    """The whole command; returns its exit status."""
    try:
        request = parse(arguments)
        if request.wants_help:
            print_help(Console(), SHORT_NAMES)
            return EXIT_DONE
        config = load(request)
        if request.is_dry_run:
            can_start = preflight.dry_run(Console(), config, output=request.output, resume=request.resume)
            return EXIT_DONE if can_start else EXIT_USAGE
        resumed = preflight.check(config, output=request.output, resume=request.resume)
    except AzrError as error:  # nothing was started
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:  # before the programs were started; from then on the launcher listens
        return EXIT_INTERRUPTED
    try:
        return launcher.launch(config, output=request.output, resumed=resumed, env=env)
    except AzrError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:  # before the programs were started; from then on the launcher listens
        return EXIT_INTERRUPTED


def parse(arguments: Sequence[str]) -> Request:
    """Take the command line apart; values are validated later, together with the file's.

    Raises ConfigError when an option of the command itself lacks its value.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for option in ("--config", "--output", "--resume"):
        parser.add_argument(option, type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    plain, unknown = argparse.Namespace(), list[str]()

    def parse_all(_: argparse.ArgumentParser, texts: list[str]) -> argparse.Namespace:
        parsed, rest = parser.parse_known_args(texts)
        plain.__dict__.update(vars(parsed))
        unknown.extend(rest)
        return parsed

    source = CliSettingsSource[_Parser](
        _CommandLineSettings,
        root_parser=parser,
        cli_parse_args=_spelled_out(arguments),
        parse_args_method=parse_all,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_parse_none_str="null",
    )
    overrides = source()
    return Request(
        problems=tuple(_unknown_options(unknown)),
        overrides=overrides,
        config_file=plain.config,
        output=plain.output,
        resume=plain.resume,
        is_dry_run=plain.dry_run,
        wants_help=plain.help,
    )


def load(request: Request) -> Config:
    """The resolved configuration. Raises ConfigError that names every problem, where it is and the way out."""
    path = request.config_file
    if request.resume is not None:
        if "path" in request.overrides.get("model", {}):
            raise ConfigError(
                "command line: --model and --resume exclude each other: a resumed run goes on with the model of its "
                "checkpoint. Leave one out; --model CHECKPOINT starts a new run from those weights."
            )
        path = path or _config_of_resumed_run(request.resume)
    in_file = {} if path is None else read_tree(path)
    try:
        config = Config.model_validate(merged(in_file, request.overrides))
    except ValidationError as error:
        raise ConfigError(explain(error.errors(), request.overrides, path, typed=request.problems)) from None
    if request.problems:
        raise ConfigError(_report("command line", request.problems))
    return config


def explain(problems: Sequence[ErrorDetails], overrides: Tree, path: Path | None, *, typed: Sequence[str] = ()) -> str:
    """All problems, the file or the command line first, one line each: the setting, then what to do about it.

    `typed` are lines about the command line that are known already.
    """
    at_command_line, in_file = list(typed), list[str]()
    for problem in problems:
        is_typed = path is None or _is_typed(problem, overrides)
        lines = _explain_one(problem, is_typed=is_typed)
        (at_command_line if is_typed else in_file).extend(lines)
    blocks = ((str(path), in_file), ("command line", at_command_line))
    return "\n".join(_report(where, list(dict.fromkeys(lines))) for where, lines in blocks if lines)


def _explain_one(problem: ErrorDetails, *, is_typed: bool) -> list[str]:
    *_, last = location = [part for part in problem["loc"] if isinstance(part, str)] or [""]
    if ".".join(location[:2]) in setting_names():  # what follows names one of several kinds of value
        *_, last = location = location[:2]
    name = ".".join(location)
    shown = _as_option(name) if is_typed and "." in name else name
    if problem["type"] == "extra_forbidden":
        return [f"{shown} is not a setting. {_guess(name, setting_names(), is_typed=is_typed)}"]
    if problem["type"] == "value_error":
        prefix = f"{shown}: " if last else ""
        return [f"{prefix}{line}" for line in problem["msg"].removeprefix("Value error, ").split("\n")]
    if name not in setting_names():
        return [f"{shown} = {problem['input']!r}: {name} is a section; write its settings under it, indented."]
    return [f"{shown} = {problem['input']}: needs {expected(name)}."]


def _is_typed(problem: ErrorDetails, overrides: Tree) -> bool:
    """Was the setting, or one that the message of a combination names, given on the command line?"""
    node: Any = overrides
    for part in problem["loc"]:
        if not isinstance(node, dict):
            return True
        if part not in node:
            return False
        node = node[part]
    if problem["type"] != "value_error" or not isinstance(node, dict):
        return True
    typed = [f"{section}.{name}" for section, names in overrides.items() for name in names]
    return any(name in problem["msg"] or f"{name.split('.')[1]} = " in problem["msg"] for name in typed)


def _unknown_options(rest: Sequence[str]) -> list[str]:
    options = [text.split("=")[0] for text in rest if text.startswith("-")]
    stray = [text for before, text in zip(["", *rest], rest, strict=False) if not {text[:1], before[:1]} & {"-"}]
    known = [*PLAIN_OPTIONS, *SHORT_NAMES, *map(_as_option, setting_names())]
    return [
        *(f"{option} is not an option. {_guess(option, known, is_typed=True)}" for option in options),
        *(f"{text!r} stands alone. Settings are written --section.name value." for text in stray),
    ]


def _guess(name: str, known: Sequence[str], *, is_typed: bool) -> str:
    guesses = get_close_matches(name, known, n=1)
    if not guesses:  # the right name in the wrong section
        guesses = [other for other in known if other.split(".")[-1] == name.split(".")[-1].removeprefix("--")][:1]
    if not guesses:
        return "`python run.py --help` lists them all."
    return f"Did you mean {_as_option(guesses[0]) if is_typed and '--' not in guesses[0] else guesses[0]}?"


def _report(where: str, lines: Sequence[str]) -> str:
    count = "1 setting needs attention" if len(lines) == 1 else f"{len(lines)} settings need attention"
    return "\n  ".join([f"{where}: {count}", *lines])


def _as_option(name: str) -> str:
    by_setting = {setting: short for short, setting in SHORT_NAMES.items()}
    return by_setting.get(name, f"--{name.replace('_', '-')}")


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """Short names as `--section.field`, and underscores in names as dashes."""
    spelled = []
    for text in arguments:
        option, equals, value = text.partition("=")
        if option.startswith("--"):
            option = option.replace("_", "-")
            option = "--" + SHORT_NAMES.get(option, option[2:]).replace("_", "-")
        spelled.append(option + equals + value)
    return spelled


def _config_of_resumed_run(resume: Path) -> Path:
    # A checkpoint is <run>/checkpoints/step-NNNNNN; --resume takes that folder or the run's.
    folder = files.expanded(str(resume)).absolute()
    if not files.is_dir(folder):
        raise ConfigError(f"--resume: there is no checkpoint or run folder {resume}. Name one that exists.")
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if not files.is_file(run_dir / CONFIG_FILE):
        raise ConfigError(
            f"--resume: {resume} is not in a run folder, so there is no {CONFIG_FILE} that tells its settings. Say "
            "which with --config."
        )
    return run_dir / CONFIG_FILE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise ConfigError(f"command line: {message.removeprefix('argument ')}. `python run.py --help` shows how.")


# The sections of `Config` as pydantic-settings wants them; only ever read from the command line.
_SECTIONS: Final[dict[str, Any]] = {name: (field.annotation, field) for name, field in Config.model_fields.items()}
_CommandLineSettings: Final = create_model("_CommandLineSettings", __base__=BaseSettings, **_SECTIONS)
