"""One rank of a learner that computes in bfloat16: trains with sharded and with copied weights, and writes it down.

Usage: python -m tests.adapters.bfloat16_rank RESULT_FOLDER, with RANK, WORLD_SIZE, ... set.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.adapters.trainer.sharding import whole
from azr_async.config import Config
from tests.random_models import random_model
from tests.rollout_batches import random_batch

STEPS = 4
SETTINGS: dict[str, Any] = {
    "model": {"precision": "bfloat16"},
    "flow": {"max_lag": 2},
    # AdamW moves a weight by about the learning rate, here a millionth of the largest weights.
    "learner": {"layout": "packed", "microbatch_tokens": 60, "learning_rate": 1e-6, "warmup_steps": 0},
}


def main(folder: Path) -> None:
    """Each way to have the weights on several ranks."""
    accelerator = connect_ranks(Config.model_validate(SETTINGS))
    for sharding in ("full", "none"):
        learner = SETTINGS["learner"] | {"sharding": sharding}
        results = trained(Config.model_validate(SETTINGS | {"learner": learner}), accelerator)
        if accelerator.is_main_process:
            (folder / f"{sharding}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()


def trained(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and the root of the mean square by which weights moved."""
    model = random_model("qwen2-tied")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, config, accelerator)
    reports = [trainer.train(random_batch(version, lag=2)) for version in range(STEPS)]
    after = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    return {
        "losses": [report.loss for report in reports],
        "grad_norms": [report.grad_norm for report in reports],
        "moved": float(moved.square().mean().sqrt()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
