"""What must be true of this machine before a run starts, all asked at once; and the dry run, which starts nothing."""

import errno
import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from azr_async.algorithm.dialogue.compact import MARKERS
from azr_async.config import Config
from azr_async.errors import AzrError, ConfigError
from azr_async.programs import placement
from azr_async.programs.folders import config_text
from azr_async.programs.wiring import endpoint, endpoint_names

_CHECKPOINT_NAME: Final = re.compile(r"step-(\d{6,})")
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Where a run goes on from."""

    checkpoint: Path
    step: int

    @property
    def run_dir(self) -> Path | None:
        """The run that wrote the checkpoint; None when it was moved out of it."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else None


def check(config: Config, *, output: Path | None, resume: Path | None) -> Resumed | None:
    """Ask everything that can be asked before a program starts; returns the checkpoint to go on from.

    Raises:
        ConfigError: names every problem and the way out.
        CheckpointError: the checkpoint is missing or damaged.
    """
    problems = [
        *_gpu_problems(config),
        *_file_problems(config, output),
        *_language_problems(config),
        *_port_problems(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return None if resume is None else _checkpoint(resume.expanduser(), config)


def print_dry_run(console: Console, config: Config) -> None:
    """The resolved configuration and which program would run where; says what this machine has."""
    console.print(config_text(config), highlight=False, markup=False, soft_wrap=True)
    table = Table("process", "device", "role", title="placement", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for placed in placement.place(config):
        table.add_row(placed.process, placed.devices, placed.role)
    console.print(table)
    found = placement.gpus_found()
    console.print(f"\nThis machine has {placement.describe_host(found)}. Nothing was started.", highlight=False)
    for problem in _gpu_problems(config, found):
        console.print(f"It could not start here: {problem}", highlight=False, markup=False, soft_wrap=True)


def _gpu_problems(config: Config, found: int | None = None) -> Iterator[str]:
    if placement.gpus_needed(config) == 0:
        return
    try:
        placement.check_gpus(config, placement.gpus_found() if found is None else found)
    except ConfigError as error:
        yield str(error)


def _file_problems(config: Config, output: Path | None) -> Iterator[str]:
    model = Path(config.model.path).expanduser()
    is_known = config.model.path == "starter" or _HUB_ID.fullmatch(config.model.path)
    if not is_known and not model.is_dir():
        yield (
            f"model.path: there is no folder {config.model.path}. Give `starter`, an existing Hugging Face folder, "
            "or a hub id of the form organisation/name."
        )
    elif model.is_dir() and config.model.path != "starter" and not (model / "config.json").is_file():
        yield f"model.path: {model} is not a model folder: it has no config.json. Name a folder that has one."
    if config.library.seed_file is not None and not config.library.seed_file.is_file():
        yield f"library.seed_file: there is no file {config.library.seed_file}. Give a JSONL of tasks, or leave it out."
    if config.evaluation.suite not in ("starter", "none") and not Path(config.evaluation.suite).is_file():
        yield f"evaluation.suite: no file {config.evaluation.suite}. Give a JSONL of tasks, `starter` or `none`."
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        yield f"--output: {output} exists and is not an empty folder. Choose another name, or leave it out."


def _language_problems(config: Config) -> Iterator[str]:
    """Can the model's tokenizer say what the dialogue asks for? Only a local folder can be looked into."""
    path, dialogue = config.model.path, config.model.dialogue
    folder = Path(path).expanduser()
    is_compact = path == "starter" or _names_all(folder / "tokenizer.json", MARKERS)
    if dialogue == "compact" and not is_compact and (_HUB_ID.fullmatch(path) or (folder / "config.json").is_file()):
        is_folder = "" if folder.is_dir() else f"there is no folder {path}, so it is taken for a hub id; and "
        yield (
            f"model.dialogue: {is_folder}compact is the starter's language, whose markers {path} does not have. "
            "Use --model.dialogue azr-chat for a model with a chat template, azr-base for a base model."
        )
    if dialogue != "compact" and path == "starter":
        yield f"model.dialogue: the starter speaks only compact, not {dialogue}. Leave model.dialogue out."
    has_template = (folder / "chat_template.jinja").is_file() or _names_all(
        folder / "tokenizer_config.json", ("chat_template",)
    )
    if dialogue == "azr-chat" and (folder / "tokenizer_config.json").is_file() and not has_template:
        yield f"model.dialogue: the tokenizer of {path} has no chat template. Use --model.dialogue azr-base."


def _names_all(json_file: Path, names: Sequence[str]) -> bool:
    try:
        text = json_file.read_text(encoding="utf-8")
    except OSError:
        return False
    return all(json.dumps(name) in text for name in names)


def _port_problems(config: Config) -> Iterator[str]:
    if config.wires.transport == "tcp":
        ports = {urlsplit(endpoint(config, Path(), name)).port or 0: name for name in endpoint_names(config)}
        busy = [port for port in sorted(ports) if not _is_free(port)]
        if busy:
            yield (
                f"wires.base_port: port {', '.join(map(str, busy))} of {min(ports)} to {max(ports)} is in use. Choose "
                "another wires.base_port, stop the program that has it (`ss -ltnp` shows it), or set "
                "wires.transport to ipc."
            )
    if config.weights.port and not _is_free(config.weights.port):
        yield f"weights.port: port {config.weights.port} is in use. Choose another, or 0 to have a free one picked."


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
        return True


def _checkpoint(path: Path, config: Config) -> Resumed:
    from azr_async.adapters import checkpoints  # loads torch, which only a resumed run needs here

    folder = path
    if not _CHECKPOINT_NAME.fullmatch(path.name):
        newest = checkpoints.newest(path / "checkpoints")
        if newest is None:
            raise AzrError(
                f"there is no complete checkpoint in {path}. Give --resume a run directory, or its "
                "checkpoints/step-NNNNNN folder."
            )
        folder = newest
    checkpoints.verify(folder)
    match = _CHECKPOINT_NAME.fullmatch(folder.name)
    step = int(match[1]) if match else 0
    if step >= config.run.steps:
        raise ConfigError(
            f"--resume: {folder} is at step {step}, and the run ends at step {config.run.steps}. Raise --steps."
        )
    return Resumed(checkpoint=folder.absolute(), step=step)
