"""One rank of a learner whose weights are spread over the ranks: trains, saves, and goes on from another's checkpoint.

Usage: python -m tests.adapters.sharded_rank RESULT_FOLDER, with RANK, WORLD_SIZE, ... set.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azr_async.adapters import checkpoints
from azr_async.adapters.channels import wire
from azr_async.adapters.models import load_model
from azr_async.adapters.trainer import Crew, Trainer, connect_ranks, follow, loading_device
from azr_async.config import Config
from azr_async.messages import RolloutBatch
from tests.live_bytes import LiveBytes
from tests.random_models import random_model
from tests.rollout_batches import random_batch

LEARNERS: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"layout": "packed", "entropy_weight": 0.01, "gradient_checkpointing": True},
    "llama-untied": {"layout": "packed"},
    "qwen2-untied": {"layout": "rows", "minibatches": 2, "proximal": "recomputed"},
}
"""By kind of model; micro-batches are small, so that gradients accumulate."""

STEPS = 10
SAVED_STEP = 5
CANARIES = [np.arange(7, dtype=np.int32), np.arange(90, 95, dtype=np.int32)]


def main(folder: Path) -> None:
    """For each kind of model in the folder: all steps, then the last ones from a checkpoint of one rank, if any."""
    accelerator = connect_ranks(Config())
    check_stream(accelerator)
    for kind in LEARNERS:
        config = config_of(kind)
        for name, source, first in (("whole", kind, 0), ("resumed", f"{kind}-one/step-000005", SAVED_STEP)):
            if not (folder / source).is_dir():
                continue
            trainer, model, tokenizer = loaded(folder / source, config, accelerator, version=first)
            check_parts(trainer, model, accelerator)
            if accelerator.process_index:
                follow(trainer, accelerator, decode=decoded)
                continue
            crew = Crew(trainer, accelerator, encode=wire.encode)
            reports = run(crew, range(first, STEPS), partial(save, folder / f"{kind}-{name}", crew, model, tokenizer))
            scores = crew.score(CANARIES).tolist()
            save_file({key: weight.clone() for key, weight in crew.named_weights()}, folder / f"{kind}-{name}.weights")
            crew.dismiss()
            (folder / f"{kind}-{name}.json").write_text(json.dumps({"reports": reports, "scores": scores}))
    torch.distributed.destroy_process_group()


def config_of(kind: str) -> Config:
    """Settings of this kind of model's run."""
    learner = {"microbatch_tokens": 60, **LEARNERS[kind]}
    return Config.model_validate({"flow": {"max_lag": 2}, "learner": learner})


def loaded(
    source: Path, config: Config, accelerator: Accelerator, *, version: int
) -> tuple[Trainer, PreTrainedModel, PreTrainedTokenizerBase]:
    """The trainer at `version`, of the start or of a checkpoint, which only rank 0 reads."""
    model, tokenizer = load_model(str(source), "float32", loading_device(config, accelerator))
    trainer = Trainer(model, config, accelerator, version=version)
    if version:
        trainer.load_optimizer_state(checkpoints.load(source).optimizer if accelerator.is_main_process else {})
    return trainer, model, tokenizer


def run(crew: Crew | Trainer, versions: range, save_now: Callable[[], None]) -> list[dict[str, float]]:
    """Train the batch of each version, and save when it is time."""
    reports = []
    for version in versions:
        report = crew.train(random_batch(version, lag=2))
        reports.append({"loss": report.loss, "grad_norm": report.grad_norm, "ess": report.ess, "kl": report.kl_k3})
        if report.version == SAVED_STEP:
            save_now()
    return reports


def save(root: Path, crew: Crew, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A checkpoint, as the learner writes it."""
    weights, optimizer = crew.checkpoint_state()
    step = crew.version
    content = checkpoints.copied(model, optimizer, step=step, version=step, extra={}, weights=weights)
    checkpoints.save(root, content, model=model, tokenizer=tokenizer, keep=2)


def check_parts(trainer: Trainer, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Every weight is here in part only, when there is more than one rank."""
    if not trainer.is_sharded:
        return
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.dtype == torch.float32
        rows = -(-parameter.shape[0] // accelerator.num_processes)
        assert parameter.to_local().shape[0] <= rows


def check_stream(accelerator: Accelerator) -> None:
    """The weights go out one after the other: no rank ever has more than a few of them whole."""
    model = random_model("llama-untied", num_hidden_layers=16)
    total_bytes = sum(parameter.nbytes for parameter in model.parameters())
    trainer = Trainer(model, Config(), accelerator)
    parts = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    kept = [part.untyped_storage() for part in parts]  # only what is held is counted
    live = LiveBytes(parts)
    kept_bytes = live.live
    with live:
        largest_bytes = max(weight.nbytes for _, weight in trainer.named_weights())
    assert kept_bytes == sum(storage.nbytes() for storage in kept)
    # Few at a time: from all ranks, put together, cut where rows were filled up, given out, and the one before it.
    assert live.peak - kept_bytes <= 5 * largest_bytes < total_bytes / 4


def decoded(payload: bytes) -> RolloutBatch:
    """A batch from the wire."""
    batch = wire.decode(payload, limit_bytes=2**24)
    assert isinstance(batch, RolloutBatch)
    return batch


if __name__ == "__main__":
    main(Path(sys.argv[1]))
