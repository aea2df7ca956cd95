"""What every process of vLLM does first: know our transfer backend, and end when the worker that started it ends."""

import ctypes
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
from typing import Final

BACKEND: Final = "azr_async"
"""The name under which `vllm_backend.BroadcastTransfer` is asked for."""

EXTENSION: Final = "azr_async.adapters.weights.vllm_backend.Watched"
"""What vLLM's workers can be asked besides; vLLM imports it before it loads a model."""

_PR_SET_PDEATHSIG: Final = 1


def register() -> None:
    """Called by vLLM, through the entry point group `vllm.general_plugins`, in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # vllm is optional

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "azr_async.adapters.weights.vllm_backend", "BroadcastTransfer"
        )
    parent = multiprocessing.parent_process()
    if parent is not None:
        _die_with(parent)


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Be killed by the kernel when the thread that started this process ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if not parent.is_alive():
            os._exit(1)
