"""What must be true of this machine before a run starts, all asked at once; and the dry run, which starts nothing."""

import errno
import importlib.util
import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from azr_async.algorithm.dialogue.compact import MARKERS
from azr_async.config import Config
from azr_async.errors import AzrError, ConfigError
from azr_async.programs import files, fit, placement
from azr_async.programs.folders import begun_from, config_text
from azr_async.programs.memory_table import cache_note, heading, parts_table, splits_table
from azr_async.programs.model_shapes import shape_of
from azr_async.programs.summary import begins_anew
from azr_async.programs.wiring import endpoint, endpoint_names

_CHECKPOINT_NAME: Final = re.compile(r"step-(\d{6,})")
_HIGHEST_PORT: Final = 65_535
_COMMON_GPU_GB: Final = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Where a run goes on from."""

    checkpoint: Path | None
    """None: the run ended before its first one. It starts anew, with the tasks that it has found."""
    step: int
    """Of the checkpoint; -1 without one."""
    run_dir: Path | None
    """The run that wrote the checkpoint; None when it was moved out of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What stands in the way of a run, each with the way out."""

    here: tuple[str, ...]
    """What only this machine lacks, GPUs, vLLM, the way to the hub: a dry run is often made on another than the run."""
    others: tuple[str, ...]
    resumed: Resumed | None
    """Where the run would go on from."""


def check(config: Config, *, output: Path | None, resume: Path | None) -> Resumed | None:
    """Ask everything that can be asked before a program starts; returns the checkpoint to go on from.

    Raises ConfigError that names every problem and the way out.
    """
    findings = examine(config, output=output, resume=resume)
    problems = [*findings.here, *findings.others]
    if problems:
        raise ConfigError("\n".join(problems))
    return findings.resumed


def examine(config: Config, *, output: Path | None, resume: Path | None) -> Findings:
    """All of the questions, whatever the answers."""
    here, hub = [*_gpu_problems(config), *_package_problems(config)], files.hub_problem(config.model.path)
    if hub is not None and hub.is_of_this_machine:
        here.append(hub.text)
    others = [
        *([hub.text] if hub is not None and not hub.is_of_this_machine else []),
        *_engine_problems(config),
        *_memory_problems(config),
        *files.problems(config, output),
        *_language_problems(config),
        *_port_problems(config),
    ]
    resumed = None
    try:
        resumed = None if resume is None else _checkpoint(resume, config)
    except AzrError as error:
        others.append(str(error))
    return Findings(here=tuple(here), others=tuple(others), resumed=resumed)


def dry_run(console: Console, config: Config, *, output: Path | None, resume: Path | None) -> bool:
    """Show the resolved configuration, which program would run where, what this machine has, and every problem.

    Returns whether a run could start, here or on a machine that has the GPUs and reaches the model.
    """
    console.print(config_text(config), highlight=False, markup=False, soft_wrap=True)
    table = Table("process", "device", "role", title="placement", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for placed in placement.place(config):
        table.add_row(placed.process, placed.devices, placed.role)
    console.print(table)
    _show_memory(console, config)
    findings = examine(config, output=output, resume=resume)
    if findings.resumed is not None:
        where = findings.resumed.checkpoint or "its beginning, with the tasks of its journal: it has no checkpoint yet"
        console.print(f"\nIt would go on from {where}.", highlight=False, soft_wrap=True)
    host = placement.describe_host(placement.gpus_found())
    console.print(f"\nThis machine has {host}. Nothing was started.", highlight=False)
    for problem in findings.here:
        console.print(f"It could not start here: {problem}", highlight=False, markup=False, soft_wrap=True)
    for problem in findings.others:
        console.print(f"It could not start: {problem}", highlight=False, markup=False, soft_wrap=True)
    return not findings.others


def _gpu_problems(config: Config) -> Iterator[str]:
    if placement.gpus_needed(config) == 0:
        return
    try:
        placement.check_gpus(config, placement.gpus_found())
    except ConfigError as error:
        yield str(error)


def _engine_problems(config: Config) -> Iterator[str]:
    try:
        placement.check_engines(config)
    except ConfigError as error:
        yield str(error)


def _package_problems(config: Config) -> Iterator[str]:
    if config.engine_kind == "vllm" and importlib.util.find_spec("vllm") is None:
        yield (
            "engine.kind = vllm, which is what `auto` means on GPUs, but vLLM is not installed here. Install it with "
            "`pip install -e '.[vllm]'` (README.md has the line for CPUs), or use --engine transformers."
        )


def _memory_problems(config: Config) -> Iterator[str]:
    """What the GPUs have no room for; nothing is known about a model whose shape is not."""
    if placement.gpus_needed(config) == 0:
        return
    shape = shape_of(config.model.path)
    if shape is not None:
        yield from fit.problems(config, shape, _gpu_bytes(config))


def _show_memory(console: Console, config: Config) -> None:
    if placement.gpus_needed(config) == 0:
        return
    shape, gpu_bytes = shape_of(config.model.path), _gpu_bytes(config)
    if shape is None:
        text = f"\nMemory is not estimated: the shape of {config.model.path} is unknown, its config.json is not here."
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    fits = fit.fit_of(config, shape, gpu_bytes)
    title = heading(config, shape, fits, gpu_bytes)
    console.print(f"\n{title}", highlight=False, markup=False, soft_wrap=True)
    console.print(parts_table(config, fits))
    console.print(cache_note(config, fits), highlight=False, soft_wrap=True)
    console.print("\nthe same settings on other GPUs: engine + learner, GB per GPU", highlight=False)
    console.print(splits_table(config, shape))


def _gpu_bytes(config: Config) -> int:
    """Of one GPU: as set, else this machine's smallest, else a common one."""
    if config.placement.gpu_memory_gb:
        return round(config.placement.gpu_memory_gb * fit.GB)
    return placement.smallest_gpu_bytes(placement.gpus_found()) or _COMMON_GPU_GB * fit.GB


def _language_problems(config: Config) -> Iterator[str]:
    """Can the model's tokenizer say what the dialogue asks for? Only a local folder can be looked into."""
    path, dialogue = config.model.path, config.model.dialogue
    folder = files.expanded(path)
    is_compact = path == "starter" or _names_all(folder / "tokenizer.json", MARKERS)
    is_model = files.is_hub_id(path) or files.is_file(folder / "config.json")
    if dialogue == "compact" and not is_compact and is_model:
        is_folder = "" if files.is_dir(folder) else f"there is no folder {path}, so it is taken for a hub id; and "
        yield (
            f"model.dialogue: {is_folder}compact is the starter's language, whose markers {path} does not have. "
            "Use --model.dialogue azr-chat for a model with a chat template, azr-base for a base model."
        )
    if dialogue != "compact" and path == "starter":
        yield f"model.dialogue: the starter speaks only compact, not {dialogue}. Leave model.dialogue out."
    has_template = files.is_file(folder / "chat_template.jinja") or _names_all(
        folder / "tokenizer_config.json", ("chat_template",)
    )
    if dialogue == "azr-chat" and files.is_file(folder / "tokenizer_config.json") and not has_template:
        yield f"model.dialogue: the tokenizer of {path} has no chat template. Use --model.dialogue azr-base."


def _names_all(json_file: Path, names: Sequence[str]) -> bool:
    try:
        text = json_file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # not there, not text, or no path at all
        return False
    return all(json.dumps(name) in text for name in names)


def _port_problems(config: Config) -> Iterator[str]:
    if config.wires.transport == "tcp":
        ports = [int(endpoint(config, Path(), name).rpartition(":")[2]) for name in endpoint_names(config)]
        if max(ports) > _HIGHEST_PORT:
            yield (
                f"wires.base_port: {config.inference_workers} inference workers need ports up to {max(ports)}, but the "
                f"highest is {_HIGHEST_PORT}. Lower wires.base_port by {max(ports) - _HIGHEST_PORT} or more."
            )
            return
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


def _checkpoint(resume: Path, config: Config) -> Resumed:
    from azr_async.adapters import checkpoints  # loads torch, which only a resumed run needs here

    folder = path = files.expanded(str(resume))
    if not files.is_dir(path):
        raise ConfigError(f"--resume: there is no checkpoint or run folder {resume}. Name one that exists.")
    if not _CHECKPOINT_NAME.fullmatch(path.name):
        newest = checkpoints.newest(path / "checkpoints") or begun_from(path)
        if newest is None and begins_anew(path):
            return Resumed(checkpoint=None, step=-1, run_dir=path)
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
    home = folder.absolute().parent
    run_dir = home.parent if home.name == "checkpoints" else None
    return Resumed(checkpoint=folder.absolute(), step=step, run_dir=run_dir if folder is path else path.absolute())
