"""Loads a causal language model and its tokenizer from the starter, a folder or the hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from azr_async.errors import CheckpointError
from azr_async.starter.suite import STARTER_CHECKPOINT

Precision = Literal["float32", "bfloat16"]

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def load_model(
    path: str, precision: Precision, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer.

    Args:
        path: `starter`, a Hugging Face model folder, or a hub id such as `Qwen/Qwen2.5-0.5B`.
        precision: type of the weights.
        device: where the weights go; for `meta` they are not even read, the model has their shapes only.

    Raises CheckpointError when there is no such model, or it cannot be read.
    """
    source = model_source(path)
    disable_progress_bar()  # it would fill the log
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = _read(source, getattr(torch, precision), torch.device(device))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"the model {source} cannot be loaded: {str(error).rstrip('.')}. Point model.path at a Hugging Face folder "
            "with config.json, weights in safetensors form and a tokenizer, or at a hub id."
        ) from error
    # Where files are missing, transformers goes on with an empty tokenizer, or with random numbers.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CheckpointError(
            f"{source} has no tokenizer that knows any text. Point model.path at a model that was saved together with "
            "its tokenizer."
        )
    unusable = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if unusable:
        raise CheckpointError(
            f"the weights of {source} lack {len(unusable)} parameters of its architecture, among them {unusable[0]}. "
            "Point model.path at a complete causal language model."
        )
    return model.to(device).eval(), tokenizer


def _read(source: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Mapping[str, Any]]:
    """The model, and which weights it lacks."""
    if device.type == "meta":
        with device:
            shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
        return shapes, {"missing_keys": (), "mismatched_keys": ()}
    # Weights in pickle form are refused: loading them may run code.
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    return model, report


def model_source(path: str) -> str:
    """What Hugging Face is asked for; a missing folder is told at once, without asking the hub for it."""
    if path == "starter":
        if not (STARTER_CHECKPOINT / "config.json").is_file():
            raise CheckpointError(
                f"the starter model is not in {STARTER_CHECKPOINT}. Make it with `python -m azr_async starter`, "
                "or set model.path to another model."
            )
        return str(STARTER_CHECKPOINT)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is not a model folder: it has no config.json. Set model.path to a folder that has one, "
                "for example a run's checkpoints/step-NNNNNN."
            )
        return str(folder)
    if _HUB_ID.fullmatch(path) is None:
        raise CheckpointError(
            f"there is no model folder {path}. Set model.path to `starter`, an existing folder, or a hub id "
            "of the form organisation/name."
        )
    return path
