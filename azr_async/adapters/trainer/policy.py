"""Log-probabilities of the trained tokens, and what must be found out about a model before they can be trusted."""

import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from azr_async.adapters.trainer.attention import use_packed_attention
from azr_async.adapters.trainer.chunks import Branches, Chunk, Segments, chunk_of, packed_chunk_of
from azr_async.adapters.trainer.samples import unrewarded
from azr_async.algorithm.packing import SHARED_ROW_TOKENS
from azr_async.algorithm.token_logp import Head, chosen_logp, logits_logp

SAME_NATS: Final = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Rounding stays below, a model that computes something else does not; by type of the matrix products."""

_FLOAT32_BYTES: Final = 4
_ANSWERS: Final = [
    unrewarded(np.array([1, 2, 3, *ending], np.int32), prompt_length=3) for ending in ([4, 5], [6, 7, 2])
]
"""Two completions of one prompt, to try a model with."""

log = logging.getLogger(__name__)


class TokenPolicy(nn.Module):
    """Log-probabilities of chosen tokens. A module only because DDP, FSDP and autocast hook into a module's forward."""

    def __init__(self, model: nn.Module, *, logits_mb: int) -> None:
        super().__init__()
        self.model = model
        self.most_logits = logits_mb * 2**20 // _FLOAT32_BYTES
        self.head: tuple[float, float] | None = (1.0, 0.0)
        """Scale and cap behind the output layer; None to let the model make all of its logits itself."""

    def forward(self, chunk: Chunk, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """[N] log-probabilities and [N] entropies (zeros unless wanted); float32, nats, at the chunk's temperatures.

        The head runs on the trained positions only, and on a part of them at a time: its logits are by far the
        largest tensors of a real model.
        """
        # Without more, attention is causal, and padding is on the right: no real token sees it, no mask is needed.
        inputs = {"input_ids": chunk.ids_BT, "use_cache": False, **_attention(chunk)}
        body: Any = self.model
        if self.head is None:
            logits_NV = body(**inputs).logits.flatten(0, 1).index_select(0, chunk.place_N)
            return logits_logp(logits_NV, chunk.target_N, chunk.temperature_N, with_entropy=with_entropy)
        hidden_NH = body.base_model(**inputs).last_hidden_state.flatten(0, 1).index_select(0, chunk.place_N)
        scale, cap = self.head
        output = body.get_output_embeddings()
        return chosen_logp(
            hidden_NH,
            Head(weight_VH=output.weight, bias_V=output.bias, scale=scale, cap=cap),
            chunk.target_N,
            chunk.temperature_N,
            with_entropy=with_entropy,
            most_logits=self.most_logits,
        )


def find_head(policy: TokenPolicy, device: torch.device, *, same_nats: float) -> None:
    """Set what this model does to the product of its output layer; where it is nothing known, leave it to the model."""
    model: Any = policy.model
    chunk = chunk_of([[answer] for answer in _ANSWERS], device)
    heads = _known_heads(policy) if type(model.get_output_embeddings()) is nn.Linear else []
    with torch.no_grad():
        policy.head = None
        whole_N, _ = policy(chunk)
        errors = []
        for head in heads:
            policy.head = head
            errors.append(float((policy(chunk)[0] - whole_N).abs().max()))
    best = min(range(len(heads)), key=errors.__getitem__, default=None)
    if best is not None and errors[best] < same_nats:
        policy.head = heads[best]
        return
    policy.head = None
    log.warning(
        "what %s does after its output layer is not known here; it computes the logits of all tokens at once, which "
        "takes more memory: lower learner.microbatch_tokens if it runs out",
        type(model).__name__,
    )


def can_share(policy: TokenPolicy, device: torch.device, *, same_nats: float) -> bool:
    """Try it: does this architecture keep completions of one row apart? Not all take a mask of one's own."""
    window = getattr(_text_config(policy), "sliding_window", None)
    if window is not None and window < SHARED_ROW_TOKENS:
        return False
    return _is_same(policy, lambda: chunk_of([_ANSWERS], device), _alone(device), same_nats)


def can_pack(policy: TokenPolicy, device: torch.device, *, same_nats: float) -> bool:
    """Try it: does this architecture keep the sequences of a packed row apart? If not, it attends as it did before."""
    model: Any = policy.model
    config = _text_config(policy)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return False
    before = use_packed_attention(model)
    if _is_same(policy, lambda: packed_chunk_of(_ANSWERS, device), _alone(device), same_nats):
        return True
    model.set_attn_implementation(before)
    return False


def _attention(chunk: Chunk) -> dict[str, Any]:
    match chunk.attention:
        case Branches(position_BT=position_BT, mask_B1TT=mask_B1TT):
            return {"position_ids": position_BT, "attention_mask": mask_B1TT}
        case Segments(position_BT=position_BT, bounds_S=bounds_S, longest=longest):
            bounds = {"cu_seq_lens_q": bounds_S, "cu_seq_lens_k": bounds_S}
            return {"position_ids": position_BT, **bounds, "max_length_q": longest, "max_length_k": longest}
        case None:
            return {}


def _known_heads(policy: TokenPolicy) -> list[tuple[float, float]]:
    """Scale and cap as they may follow from the names by which configurations call them."""
    config = _text_config(policy)
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
    scales = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    cap = next((float(value) for value in caps if value), 0.0)
    scale = next((float(value) for value in scales if value), 1.0)
    # `logits_scaling` divides in one family and multiplies in another.
    return list(dict.fromkeys([(scale, cap), (1.0 / scale, cap)]))


def _text_config(policy: TokenPolicy) -> PreTrainedConfig:
    model: Any = policy.model
    config: PreTrainedConfig = model.config.get_text_config()
    return config


def _alone(device: torch.device) -> Chunk:
    return chunk_of([[answer] for answer in _ANSWERS], device)


def _is_same(policy: TokenPolicy, together: Callable[[], Chunk], alone: Chunk, same_nats: float) -> bool:
    try:
        with torch.no_grad():
            return bool((policy(together())[0] - policy(alone)[0]).abs().max() < same_nats)
    except torch.OutOfMemoryError:
        raise  # says nothing of the architecture
    except (TypeError, ValueError, RuntimeError):
        return False
