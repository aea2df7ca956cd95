"""The learner's ranks: how they find each other, and how all of them get the same batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed

from azr_async.config import Config
from azr_async.errors import PeerVanished

GRACE_SECONDS: Final = 60.0


def connect_ranks(config: Config) -> Accelerator:
    """Join the other ranks: gloo on the CPU, NCCL on GPUs; RANK, WORLD_SIZE, ... are the launcher's.

    A rank waits for rank 0 longer than rank 0 may wait for the others between two batches, or before the first one.

    Raises PeerVanished when the others do not appear in time.
    """
    wires, weights = config.wires, config.weights
    once = wires.start_seconds + wires.step_seconds + weights.deadline_seconds
    longest_seconds = 2 * once + config.checkpoint.write_seconds + GRACE_SECONDS
    is_cpu = config.placement.train_gpus == 0
    # Weights that wait in the host's memory are reduced there.
    backend = "cpu:gloo,cuda:nccl" if config.learner.cpu_offload and not is_cpu else None
    try:
        return Accelerator(
            cpu=is_cpu,
            mixed_precision="bf16" if config.model.precision == "bfloat16" else "no",
            kwargs_handlers=[
                InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=longest_seconds)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except distributed.DistError as error:
        raise PeerVanished(
            f"the learner's {config.learner_ranks} ranks did not find each other: {error}. Look at the end of the "
            "learner-<rank> logs for the first that failed, and check that MASTER_PORT is free."
        ) from error


def share(payload: bytes, accelerator: Accelerator) -> bytes:
    """Rank 0's `payload` on every rank; what the others pass in is ignored. Bytes only, nothing is pickled.

    Raises PeerVanished when a rank is gone.
    """
    if accelerator.num_processes == 1:
        return payload
    length = torch.tensor([len(payload)], dtype=torch.int64, device=accelerator.device)
    with lost_ranks_named(accelerator):
        distributed.broadcast(length, src=0)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if accelerator.is_main_process and payload:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        data = data.to(accelerator.device)
        if len(data):
            distributed.broadcast(data, src=0)
    return data.cpu().numpy().tobytes()


@contextmanager
def lost_ranks_named(accelerator: Accelerator) -> Iterator[None]:
    """Around work that the ranks do together: a lost rank becomes PeerVanished, any other error stays what it is."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error class of its own.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error).lower():
            raise
        raise PeerVanished(
            f"rank {accelerator.process_index} of the learner lost the other ranks: {error}. "
            "Look at the end of the other learner-<rank> logs, then resume from the last checkpoint."
        ) from error
