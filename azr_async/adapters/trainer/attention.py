"""Attention for packed rows: each sequence sees itself only, and no [T, T] mask is made for it.

transformers lets an attention function be registered by name, and hands it the bounds of the sequences that the model
was called with (`cu_seq_lens_q`, as for flash attention). For a name of one's own it makes no mask.
"""

import inspect
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_ATTENTION: Final = "azr_packed"

_KERNEL_TYPES: Final = (torch.bfloat16, torch.float16)
# Releases without this option take fewer key-value heads as they are.
_TAKES_OPTION: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters
_KERNEL: Final[Any] = partial(varlen_attn, enable_gqa=True) if _TAKES_OPTION else varlen_attn
_UNKNOWN: Final = ("softcap", "s_aux", "position_bias")


def use_packed_attention(model: nn.Module) -> str:
    """Let the model attend through this module; returns the name of what it did before, for `set_attn_implementation`.

    The model may still be given padded rows: those without bounds are attended to as before.
    """
    AttentionInterface.register(PACKED_ATTENTION, _attend)
    body: Any = model
    before: str = body.config._attn_implementation
    body.set_attn_implementation(PACKED_ATTENTION)
    return before


def _attend(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: object,
) -> tuple[Tensor, None]:
    """[B, T, H, D]; the signature is that of transformers.

    Raises TypeError when the model asks for something that this attention does not compute.
    """
    if unknown := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise TypeError(f"packed attention does not know {unknown[0]}")
    if cu_seq_lens_q is None:
        if attention_mask is None and sliding_window is not None and query_BHTD.shape[2] > sliding_window:
            attention_mask = _band(query_BHTD.shape[2], sliding_window, query_BHTD.device)
        attended: Tensor = sdpa_attention_forward(
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, scaling=scaling, **options
        )[0]
        return attended, None
    dtype = _product_dtype(query_BHTD)
    if query_BHTD.is_cuda and dtype in _KERNEL_TYPES and query_BHTD.shape[3] % 8 == 0 and query_BHTD.shape[3] <= 256:
        query_THD, key_THD, value_THD = (
            tensor_BHTD[0].transpose(0, 1).to(dtype) for tensor_BHTD in (query_BHTD, key_BHTD, value_BHTD)
        )
        attended_THD: Tensor = _KERNEL(
            query_THD,
            key_THD,
            value_THD,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        )
        return attended_THD[None], None
    return _one_by_one(query_BHTD, key_BHTD, value_BHTD, cu_seq_lens_q, scaling, sliding_window), None


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast casts what its own list names; the kernel is not on it."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def _one_by_one(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    bounds_S: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Where there is no kernel for it: sequence by sequence."""
    lengths = [end - start for start, end in pairwise(bounds_S.tolist())]
    # One split, not a slice for each: the gradient of a slice is as long as the whole row.
    parts = zip(*(torch.split(tensor, lengths, 2) for tensor in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    attended = []
    for query, key, value in parts:
        length = query.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = _band(length, sliding_window, query.device)
        attended.append(
            scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(attended, 2).transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, T] bool: the last `window` tokens, itself among them."""
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return (causal_TT & causal_TT.triu(1 - window))[None, None]
