"""Weights from the learner to all engines, in a process group of their own: gloo between CPUs, NCCL between GPUs."""

from azr_async.adapters.weights.group import Sent, WeightGroup, give_up
from azr_async.adapters.weights.store import connect_store, host_store

__all__ = ["Sent", "WeightGroup", "connect_store", "give_up", "host_store"]
