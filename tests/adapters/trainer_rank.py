"""One rank of a learner in a process of its own: trains a few steps and writes down what it got.

Usage: python -m tests.adapters.trainer_rank RESULT_FOLDER, with RANK, WORLD_SIZE, ... set.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from azr_async.adapters.channels import wire
from azr_async.adapters.trainer import Trainer, connect_ranks, share
from azr_async.config import Config
from azr_async.errors import PeerVanished
from azr_async.messages import RolloutBatch
from tests.random_models import random_model
from tests.rollout_batches import random_batch

STEPS = 4
LEARNERS = (
    {"sharding": "none"},
    {"sharding": "none", "minibatches": 2, "proximal": "recomputed"},
    {"sharding": "none", "microbatch_tokens": 60, "cell_weights": "equal", "entropy_weight": 0.01},
)


def main(folder: Path) -> None:
    """Train with each of the settings."""
    accelerator = connect_ranks(Config())
    rank = accelerator.process_index
    reports = []
    for index in range(len(LEARNERS)):
        measured, weights = trained(index, accelerator)
        reports.append(measured)
        save_file(weights, folder / f"{rank}-{index}.safetensors")
    assert share(b"", accelerator) == b""
    (folder / f"{rank}.json").write_text(json.dumps(reports), encoding="utf-8")
    trainer = Trainer(random_model("qwen2-tied"), Config(), accelerator)
    if rank == 1:
        os._exit(0)  # dies without a word
    try:
        trainer.train(random_batch(0))
    except PeerVanished as error:
        (folder / "complaint.txt").write_text(str(error), encoding="utf-8")


def trained(index: int, accelerator: Accelerator) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Reports and weights after a few batches, which rank 0 makes and shares."""
    config = Config.model_validate({"flow": {"max_lag": 2}, "learner": LEARNERS[index]})
    rank = accelerator.process_index
    # Other weights on the other ranks: they must take over those of rank 0.
    trainer = Trainer(random_model("qwen2-tied", seed=rank), config, accelerator)
    reports = []
    for version in range(STEPS):
        batch = random_batch(version, lag=2)
        if version == STEPS - 1:  # too small for two ranks: one of them has nothing to compute
            batch = RolloutBatch(version=version, rollouts=(batch.rollouts[0], *batch.rollouts[-2:]))
        payload = share(wire.encode(batch) if rank == 0 else b"", accelerator)
        arrived = wire.decode(payload, limit_bytes=2**24)
        assert isinstance(arrived, RolloutBatch)
        report = trainer.train(arrived)
        reports.append({"loss": report.loss, "grad_norm": report.grad_norm, "ess": report.ess, "kl": report.kl_k3})
    return reports, {name: weight.clone() for name, weight in trainer.named_weights()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
