"""`WeightGroup` as a transfer backend of vLLM: its workers take part in the same broadcast as the embedded engine.

vLLM loads this module into each of its processes through the entry point group `vllm.general_plugins`. A backend of our
own, because those that vLLM brings wait without a deadline, check no digest, and none runs on a CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from azr_async.adapters.weights.group import WeightGroup
from azr_async.adapters.weights.store import connect_store
from azr_async.errors import WeightsError


@dataclass
class Join(WeightTransferInitInfo):
    """Become one or more ranks of a weight group: the first of them, and this engine's other processes after it."""

    host: str
    port: int
    group: int
    first_rank: int
    world_size: int
    device: str
    deadline_seconds: float


@dataclass
class Receive(WeightTransferUpdateInfo):
    """Take part in the broadcast of a version."""

    version: int


class BroadcastTransfer(WeightTransferEngine[Join, Receive]):
    """One process of the engine as one rank."""

    init_info_cls = Join
    update_info_cls = Receive

    def __init__(self, *context: Any) -> None:  # noqa: ANN401 - vLLM's, handed through
        super().__init__(*context)
        self._group: WeightGroup | None = None
        self._is_direct = False
        self._received: list[tuple[str, Tensor]] = []
        self._missing: set[str] = set()

    def init_transfer_engine(self, init_info: Join) -> None:
        """Leave the group that was, meet the others in the new one. Raises RanksLost naming who did not come."""
        self.shutdown()
        parallel = self.parallel_config
        self._is_direct = init_info.device == "cuda"
        self._group = WeightGroup(
            connect_store(init_info.host, init_info.port, init_info.deadline_seconds),
            group=init_info.group,
            rank=init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            world_size=init_info.world_size,
            device=self.device if self._is_direct else torch.device("cpu"),
            deadline_seconds=init_info.deadline_seconds,
        )

    def start_weight_update(self) -> None:
        """From now on every parameter counts as missing."""
        self._missing = {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: Receive) -> None:
        """Raises WeightsError when rank 0 stops, or sends another version than announced.

        Between GPUs tensors are put into place as they come. Through the host's memory only at the end of the update:
        so the model stays whole when a rank is lost on the way.
        """
        if self._group is None:
            raise WeightsError(
                f"version {update_info.version} was pushed before this engine joined a weight group. "
                "The learner has to send JoinWeights first; run the same version of azr_async everywhere."
            )
        self._received = []
        if self._is_direct:
            initialize_layerwise_reload(self.model)
        version, _ = self._group.receive(self._load if self._is_direct else self._received.extend)
        if version != update_info.version:
            raise WeightsError(
                f"the engine was told of version {update_info.version} but received version {version}. "
                "Resume from the last checkpoint; if it happens again, report it."
            )

    def finish_weight_update(self) -> None:
        """Put the new weights to use; every process of the engine has received them by now.

        Raises WeightsError when a parameter did not come. The model is of no use then.
        """
        if not self._is_direct:
            initialize_layerwise_reload(self.model)
            self._load(self._received)
            self._received = []
        if self._missing:
            raise WeightsError(
                f"the learner's weights came without {len(self._missing)} parameters of the engine's model, among them "
                f"{min(self._missing)}. Start every program of a run from the same model.path."
            )
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_heads(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        loaded = self.model.load_weights(tensors)
        self._missing -= loaded if loaded is not None else self._missing


def _repack_heads(model: torch.nn.Module) -> None:
    """On CPUs output layers multiply with a packed copy of their weights, which a reload of tied ones leaves old."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
