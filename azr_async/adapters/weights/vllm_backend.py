"""`WeightGroup` as a transfer backend of vLLM: its workers take part in the same broadcast as the embedded engine.

vLLM loads this module into each of its processes through the entry point group `vllm.general_plugins`. A backend of our
own, because those that vLLM brings wait without a deadline, check no digest, and none runs on a CPU.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from azr_async.adapters.weights.group import WeightGroup
from azr_async.adapters.weights.store import connect_store
from azr_async.errors import RanksLost, WeightsError


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
    """One process of the engine as one rank.

    Through the host's memory an update is received beside the engine's steps, from `start_weight_update` on, and put
    into place by `finish_weight_update`: so the model stays whole when a rank is lost on the way. Between GPUs, where
    there is no room for a second copy, tensors are put into place as they come.
    """

    init_info_cls = Join
    update_info_cls = Receive

    def __init__(self, *context: Any) -> None:  # noqa: ANN401 - vLLM's, handed through
        super().__init__(*context)
        self._group: WeightGroup | None = None
        self._is_direct = False
        self._is_plain = self.device.type == "cpu"  # see `_multiply_unpacked`
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._arriving: Future[int] = Future()
        """The version of what is being received."""
        self._announced = -1
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
        """From now on every parameter counts as missing. Raises WeightsError when no group was joined."""
        if self._group is None:
            raise WeightsError(
                "weights were pushed before this engine joined a weight group. "
                "The learner has to send JoinWeights first; run the same version of azr_async everywhere."
            )
        self._missing = {name for name, _ in self.model.named_parameters()}
        if not self._is_direct:
            self._arriving = self._beside.submit(self._receive, self._group)

    def has_arrived(self) -> bool:
        """`receive_weights` would not have to wait."""
        return self._is_direct or self._arriving.done()

    def receive_weights(self, update_info: Receive) -> None:
        """Raises RanksLost when rank 0 stops; whatever else is wrong, `finish_weight_update` raises."""
        self._announced = update_info.version
        if self._group is not None and self._is_direct:
            self._arriving = Future()
            self._begin_loading()
            try:
                self._arriving.set_result(self._group.receive(self._load)[0])
            except Exception as error:
                self._arriving.set_exception(error)
                self._end_loading()  # vLLM's layers have to be whole before it begins again
        problem = self._arriving.exception()
        if isinstance(problem, RanksLost):
            self._received = []
            raise problem

    def finish_weight_update(self) -> None:
        """Put the new weights to use; every process of the engine has received them by now.

        Raises WeightsError when what came is not what was announced, or a parameter did not come. The model is of no
        use then.
        """
        version = self._arriving.result()
        if version != self._announced:
            raise WeightsError(
                f"the engine was told of version {self._announced} but received version {version}. "
                "Resume from the last checkpoint; if it happens again, report it."
            )
        if not self._is_direct:
            self._begin_loading()
            self._load(self._received)
            self._received = []
        if self._missing:
            raise WeightsError(
                f"the learner's weights came without {len(self._missing)} parameters of the engine's model, among them "
                f"{min(self._missing)}. Start every program of a run from the same model.path."
            )
        self._end_loading()

    def _receive(self, group: WeightGroup) -> int:
        self._received = []
        return group.receive(self._received.extend)[0]

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _begin_loading(self) -> None:
        """Where vLLM uses other tensors than those of the checkpoint, it has to make them anew."""
        if not self._is_plain:
            initialize_layerwise_reload(self.model)

    def _end_loading(self) -> None:
        if not self._is_plain:
            finalize_layerwise_reload(self.model, self.model_config)

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        loaded = self.model.load_weights(tensors)
        self._missing -= loaded if loaded is not None else self._missing


class Watched:
    """What vLLM's workers can be asked besides: see `worker_extension_cls`."""

    weight_transfer_engine: BroadcastTransfer

    def weights_have_arrived(self) -> bool:
        """See `BroadcastTransfer.has_arrived`."""
        return self.weight_transfer_engine.has_arrived()


def _multiply_unpacked(layer: torch.nn.Module, remove_weight: bool) -> None:
    """On a CPU vLLM multiplies with packed copies of the weights, which would have to be made anew at every push.

    Nothing public turns that off; this is what vLLM does itself with a layer that is marked for it.
    """
    if layer.weight.ndim != 2:  # of a convolution, whose kernel takes nothing else
        _dispatch_of_vllm(layer, remove_weight)
        return
    layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]


_dispatch_of_vllm = layer_utils.dispatch_cpu_unquantized_gemm
layer_utils.dispatch_cpu_unquantized_gemm = _multiply_unpacked  # Watched is imported before the model is loaded
