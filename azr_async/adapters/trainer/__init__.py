"""The optimizer step on accelerate: a batch of rollouts in, weights one version further out."""

from azr_async.adapters.trainer.orders import Crew, follow
from azr_async.adapters.trainer.ranks import connect_ranks, share
from azr_async.adapters.trainer.report import StepReport
from azr_async.adapters.trainer.sharding import loading_device
from azr_async.adapters.trainer.trainer import Trainer

__all__ = ["Crew", "StepReport", "Trainer", "connect_ranks", "follow", "loading_device", "share"]
