"""Weights spread over the ranks: FSDP2, alike on GPUs (NCCL) and on the CPU (gloo), and tensors put together again.

accelerate starts the ranks, but leaves FSDP2 to GPUs; so that the tests run what GPUs run, it is applied here.
Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054; Zhao et al. 2023 (FSDP), arXiv:2304.11277.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from azr_async.config import Config


def is_sharded(config: Config, accelerator: Accelerator) -> bool:
    """Whether each rank holds a part of the weights only."""
    return accelerator.num_processes > 1 and config.learner.sharding == "full"


def offloads(config: Config, accelerator: Accelerator) -> bool:
    """Whether the parts wait in the host's memory until they are needed; on the CPU they are there anyway."""
    return config.learner.cpu_offload and is_sharded(config, accelerator) and accelerator.device.type != "cpu"


def loading_device(config: Config, accelerator: Accelerator) -> torch.device:
    """Where `load_model` should put the weights: sharded ones are read by rank 0 alone, into the host's memory."""
    if not is_sharded(config, accelerator):
        return torch.device(accelerator.device)
    return torch.device("cpu" if accelerator.is_main_process else "meta")


def shard(
    policy: nn.Module, model: PreTrainedModel, accelerator: Accelerator, *, dtype: torch.dtype, offload: bool
) -> None:
    """Leave to each rank its part of every weight, in float32; all of them are those of rank 0.

    A layer's weights are put together in `dtype` while it computes, those outside the layers (embedding, last norm,
    output layer) during the whole of a forward and backward pass. Gradients are added up in float32.

    Args:
        policy: the module whose forward is called; on other ranks than 0 its weights may be on the meta device.
        model: the Hugging Face model inside it.
        offload: keep the parts in the host's memory.
    """
    device = torch.device(accelerator.device)
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    weights = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in policy.named_buffers()}
    # Sharded as a mere shape, then filled: no rank ever has all of the weights on its device.
    policy.to("meta")
    model.tie_weights()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(policy, **options)
    policy.to_empty(device=torch.device("cpu") if offload else device)
    model.tie_weights()
    for name, parameter in policy.named_parameters():
        _fill(parameter, weights.pop(name), mesh)
    for name, buffer in buffers.items():
        _set_buffer(policy, name, _broadcast(buffer, device))


def scattered(full: Tensor | None, like: Tensor) -> Tensor:
    """Rank 0's `full`, cut as `like`, which may be whole; on the other ranks `full` is ignored. Collective."""
    if not isinstance(like, DTensor):
        assert full is not None
        return full.to(like.device, copy=True)
    mesh = like.device_mesh
    if distributed.get_rank() != 0 or full is None:
        full = torch.empty(like.shape, dtype=like.dtype, device=mesh.device_type)
    cut = distribute_tensor(full.to(mesh.device_type, like.dtype), mesh, like.placements)
    return cut.to(like.to_local().device)


def from_first(value: Tensor, module: nn.Module) -> Tensor:
    """Rank 0's `value` where the module is sharded, else this rank's own. Collective."""
    parameter = next(module.parameters())
    if not isinstance(parameter, DTensor):
        return value
    return _broadcast(value, torch.device(parameter.device_mesh.device_type)).to(value.device)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on this rank's device. Collective, one tensor at a time."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(tensor.device_mesh.device_type)
    full: Tensor = on_device.full_tensor()
    return full


def to_host(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies of all of them, in the host's memory where `keep`, else nothing. Collective, one after the other."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.to("cpu", copy=not isinstance(tensor, DTensor))  # a DTensor put together is a copy
    return kept


def _broadcast(value: Tensor, device: torch.device) -> Tensor:
    same = torch.empty(value.shape, dtype=value.dtype, device=device)
    if distributed.get_rank() == 0:
        same.copy_(value)
    distributed.broadcast(same, src=0)
    return same


def _fill(parameter: Tensor, full: Tensor, mesh: DeviceMesh) -> None:
    assert isinstance(parameter, DTensor)
    local: Any = scattered(None if full.is_meta else full, parameter)
    with torch.no_grad():
        parameter.to_local().copy_(local.to_local())


def _set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    """In place of the one that has no content; whether it is saved with the module stays as it was."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._buffers[leaf] = value
