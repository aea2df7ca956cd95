"""Checkpoints: a Hugging Face model folder plus what a run needs to be continued; complete or absent.

checkpoints/step-000120/
    config.json, model.safetensors, tokenizer...   `AutoModelForCausalLM.from_pretrained` reads them
    optimizer.safetensors                           AdamW's state and torch's random state
    selfplay.json                                   how self-play goes on; missing where nobody has said it
    resume.json                                     step, version, and what the learner adds
    manifest.json                                   size and SHA-256 of each file above
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azr_async.errors import CheckpointError

MANIFEST_FILE: Final = "manifest.json"
OPTIMIZER_FILE: Final = "optimizer.safetensors"
RESUME_FILE: Final = "resume.json"
SELF_PLAY_FILE: Final = "selfplay.json"
RANDOM_STATE: Final = "torch random state"
FORMAT: Final = 1

_NAME: Final = re.compile(r"step-(\d{6,})")
_LEFTOVER: Final = re.compile(r"\.step-\d{6,}\.(writing|removed|replaced)")
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_TEXTS: Final = ("No space left", "Disk quota exceeded", "File too large")
_MARGIN_BYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """What a checkpoint holds besides the model."""

    folder: Path
    step: int
    version: int
    optimizer: Mapping[str, Tensor]
    random_state: Tensor
    extra: Mapping[str, float]
    self_play: str
    """How self-play goes on; empty where nobody has said it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What becomes a checkpoint. Nothing in it changes any more, whatever is trained while it is written."""

    step: int
    version: int
    weights: Mapping[str, Tensor]
    """In the host's memory, by name; tied ones once."""
    optimizer: Mapping[str, Tensor]
    """In the host's memory."""
    random_state: Tensor
    """torch's, of every rank: none draws from it alone."""
    extra: Mapping[str, float]
    self_play: str = ""
    """What self-play has told of itself for these weights."""


def copied(
    model: PreTrainedModel,
    optimizer: Mapping[str, Tensor],
    *,
    step: int,
    version: int,
    extra: Mapping[str, float],
    self_play: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> Content:
    """Copy what is trained into the host's memory: as long as this takes, nothing may be trained.

    Args:
        model: whose weights are copied, and what it keeps beside them.
        optimizer: its state by name.
        weights: those of the model when it holds only a part of them itself. They, and `optimizer`, are then copies
            that were made for this, and stay what they are.
    """
    if weights is None:
        weights = _on_host(model.state_dict(keep_vars=True))
        optimizer = _on_host(optimizer)
    return Content(
        step=step,
        version=version,
        weights=weights,
        optimizer=optimizer,
        random_state=torch.get_rng_state(),
        extra=dict(extra),
        self_play=self_play,
    )


def save(
    root: Path, content: Content, *, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep: int
) -> Path:
    """Write `root/step-NNNNNN` whole or not at all, then delete all up to it but the `keep` newest.

    Nothing is read of the model but its class and configuration, so it may be trained meanwhile.

    Returns the folder.

    Raises:
        CheckpointError: the disk is full or does not work; nothing of this checkpoint is left, the others are as
            they were.
    """
    state = {**content.optimizer, RANDOM_STATE: content.random_state}
    folder = root / f"step-{content.step:06d}"
    with _disk_explained(folder), _written_whole(folder) as draft:
        _require_space(root, [*content.weights.values(), *state.values()])
        model.save_pretrained(draft, state_dict=dict(content.weights))
        tokenizer.save_pretrained(draft)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft / OPTIMIZER_FILE)
        if content.self_play:
            (draft / SELF_PLAY_FILE).write_text(content.self_play, encoding="utf-8")
        resume = {"format": FORMAT, "step": content.step, "version": content.version, "extra": dict(content.extra)}
        _write_json(draft / RESUME_FILE, resume)
        files = {path.name: _fingerprint(path) for path in sorted(draft.iterdir())}
        _write_json(draft / MANIFEST_FILE, {"format": FORMAT, "files": files})
    for old in [path for path in _complete(root) if _step(path) <= content.step][:-keep]:
        _remove(old)
    return folder


def oldest_step(root: Path) -> int:
    """Of the oldest checkpoint there is; 0 when there is none. No run goes on from an earlier step."""
    return min(map(_step, _complete(root)), default=0)


def remove_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`: a run that goes on from there takes those steps anew.

    Left where they are, they would count as the newest of a run that they do not belong to.
    """
    for path in _complete(root):
        if _step(path) > step:
            _remove(path)


def load(folder: Path) -> Resume:
    """Check every file against the manifest, then read the resume state.

    Raises:
        CheckpointError: a file is missing or damaged; it is named, and what to resume from instead.
    """
    verify(folder)
    resume = json.loads((folder / RESUME_FILE).read_text(encoding="utf-8"))
    state = load_file(folder / OPTIMIZER_FILE)
    self_play = folder / SELF_PLAY_FILE
    return Resume(
        folder=folder,
        step=resume["step"],
        version=resume["version"],
        random_state=state.pop(RANDOM_STATE),
        optimizer=state,
        extra=resume["extra"],
        self_play=self_play.read_text(encoding="utf-8") if self_play.exists() else "",
    )


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file is there and is what was written."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}. {_way_out(folder)}")
    manifest = folder / MANIFEST_FILE
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        files: dict[str, dict[str, str | int]] = listed["files"]
        known = listed["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is missing or damaged. {_way_out(folder)}") from error
    if not known:
        raise CheckpointError(f"{manifest} is of another version than {FORMAT}. {_way_out(folder)}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. {_way_out(folder)}")
        if _fingerprint(path) != expected:
            raise CheckpointError(f"{path} is damaged: it is not what was written. {_way_out(folder)}")


def newest(root: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    complete = _complete(root)
    return complete[-1] if complete else None


def _complete(root: Path) -> list[Path]:
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and (path / MANIFEST_FILE).is_file()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _remove(folder: Path) -> None:
    # Its name first: whatever happens in between, half a checkpoint does not count as one.
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)  # what is left goes with the next checkpoint


def _way_out(folder: Path) -> str:
    others = [path for path in _complete(folder.parent) if path != folder]
    delete = f"Delete the folder {folder} and resume from " if folder.is_dir() else "Resume from "
    return f"{delete}{others[-1]}." if others else "There is no other checkpoint beside it: start a new run."


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into; it gets its name when all of it is on the disk, and vanishes on any failure.

    What a killed process has left of others beside it goes as well.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    _flush(root.parent)
    for leftover in (path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name)):
        shutil.rmtree(leftover, ignore_errors=True)
    draft = folder.with_name(f".{folder.name}.writing")
    draft.mkdir()
    try:
        yield draft
        for path in [*draft.iterdir(), draft]:
            _flush(path)
        if folder.exists():
            _remove(folder)
        draft.rename(folder)
        _flush(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error into a text.
        is_full = getattr(error, "errno", None) in _DISK_FULL or any(text in str(error) for text in _DISK_FULL_TEXTS)
        why = "the disk is full" if is_full else f"the disk does not take it: {error}"
        remedy = "Free some space or lower checkpoint.keep" if is_full else f"Look whether {folder.parent} is writable"
        raise CheckpointError(
            f"checkpoint {folder} could not be written, and nothing of it is left: {why}. {remedy}, then resume from "
            "the last checkpoint."
        ) from error


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; of one that has several names, under the first."""
    names = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items() if names[id(tensor)] == name}


def _require_space(root: Path, tensors: list[Tensor]) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _MARGIN_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes needed, {free} free")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
