"""Log-probabilities of the trained tokens, and the tensors that they are computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from azr_async.adapters.trainer.samples import Sample, unrewarded
from azr_async.algorithm.losses import entropy
from azr_async.algorithm.packing import SHARED_ROW_TOKENS, padded, shared_rows
from azr_async.errors import TrainingError

Row = Sequence[Sample]
"""Samples with the same prompt: on the device the prompt once, then their completions one after the other."""

SAME_NATS: Final = 0.05
"""Rounding of bfloat16 stays below, a model that computes something else does not."""

_PADDING: Final = -1
_ANSWERS: Final = [
    unrewarded(np.array([1, 2, 3, *ending], np.int32), prompt_length=3) for ending in ([4, 5], [6, 7, 2])
]
"""Two completions of one prompt, to try a model with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branches:
    """How a completion sees the prompt and itself, but not the other completions of its row."""

    position_BT: Tensor
    mask_B1TT: Tensor
    """bool, [row, 1, from, to]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A micro-batch on the device: [B, T] tokens, and its N trained ones, one sample's after the other's."""

    ids_BT: Tensor
    branches: Branches | None
    """None when each row is one sample: plain causal attention."""
    place_N: Tensor
    """Where, in the flattened [B * T], the model predicts the trained token."""
    target_N: Tensor
    temperature_N: Tensor
    behavior_logp_N: Tensor
    token_version_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor


class TokenPolicy(nn.Module):
    """Log-probabilities of chosen tokens. A module only because DDP and autocast hook into a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, chunk: Chunk, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """[N] log-probabilities and [N] entropies (zeros unless wanted); float32, nats, at the chunk's temperatures.

        The head runs on the trained positions only: its logits are by far the largest tensors of a real model.
        """
        body: Any = self.model
        branches: dict[str, Tensor] = {}
        if chunk.branches is not None:
            branches = {"position_ids": chunk.branches.position_BT, "attention_mask": chunk.branches.mask_B1TT}
        # Without branches attention is causal, and padding is on the right: no real token sees it, no mask is needed.
        hidden_BTH = body.base_model(input_ids=chunk.ids_BT, use_cache=False, **branches).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, chunk.place_N)
        logits_NV = body.get_output_embeddings()(hidden_NH).float() / chunk.temperature_N[:, None]
        logp_N = -functional.cross_entropy(logits_NV, chunk.target_N, reduction="none")
        return logp_N, entropy(logits_NV) if with_entropy else torch.zeros_like(logp_N)


def rows_of(samples: Sequence[Sample], shared_tokens: int) -> list[list[Sample]]:
    """Samples of the same prompt in one row, as long as it has at most `shared_tokens`; 0 shares nothing."""
    indices = shared_rows(
        [sample.token_ids[: sample.prompt_length] for sample in samples],
        [sample.trained_tokens for sample in samples],
        limit_tokens=shared_tokens,
    )
    return [[samples[index] for index in row] for row in indices]


def row_tokens(row: Row) -> int:
    """Length of a row on the device."""
    return row[0].prompt_length + sum(sample.trained_tokens for sample in row)


def chunk_of(rows: Sequence[Row], device: torch.device) -> Chunk:
    """Put rows side by side, padded to the longest of them."""
    width = max(row_tokens(row) for row in rows)
    ids_BT = padded([_row_ids(row) for row in rows], width)
    branch_BT = np.stack([_row_branches(row, width) for row in rows])
    places = [index * width + _row_places(row) for index, row in enumerate(rows)]
    samples = [sample for row in rows for sample in row]
    counts = [sample.trained_tokens for sample in samples]

    def per_token(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), counts)).to(device)

    def completions(arrays: list[Any]) -> Tensor:
        parts = [array[sample.prompt_length :] for array, sample in zip(arrays, samples, strict=True)]
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return Chunk(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        branches=_branches(branch_BT, device) if len(samples) > len(rows) else None,
        place_N=torch.from_numpy(np.concatenate(places)).to(device),
        target_N=completions([sample.token_ids for sample in samples]).long(),
        temperature_N=per_token([sample.temperature for sample in samples]),
        behavior_logp_N=completions([sample.behavior_logp for sample in samples]),
        token_version_N=completions([sample.token_version for sample in samples]),
        advantage_N=per_token([sample.advantage for sample in samples]),
        weight_N=per_token([sample.weight for sample in samples]),
    )


def refuse_unknown_head(policy: TokenPolicy, device: torch.device) -> None:
    """Raise TrainingError when the model does more to its logits than its output layer: then ours would be others."""
    chunk = chunk_of([[answer] for answer in _ANSWERS], device)
    model: Any = policy.model
    with torch.no_grad():
        ours, _ = policy(chunk)
        logits_NV = model(input_ids=chunk.ids_BT, use_cache=False).logits.flatten(0, 1).index_select(0, chunk.place_N)
    theirs = -functional.cross_entropy(logits_NV.float(), chunk.target_N, reduction="none")
    if not (ours - theirs).abs().max() < SAME_NATS:
        raise TrainingError(
            f"{type(model).__name__} changes its logits after its output layer (a cap or a scale), which the learner "
            "does not support. Choose a model of another architecture, such as Qwen or Llama."
        )


def can_share(policy: TokenPolicy, device: torch.device) -> bool:
    """Try it: does this architecture keep completions of one row apart? Not all take a mask of one's own."""
    model: Any = policy.model
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < SHARED_ROW_TOKENS:
        return False
    try:
        with torch.no_grad():
            shared, _ = policy(chunk_of([_ANSWERS], device))
            alone, _ = policy(chunk_of([[answer] for answer in _ANSWERS], device))
    except (TypeError, ValueError, RuntimeError):
        return False
    return bool((shared - alone).abs().max() < SAME_NATS)


def _row_ids(row: Row) -> NDArray[np.int32]:
    return np.concatenate([row[0].token_ids, *(sample.token_ids[sample.prompt_length :] for sample in row[1:])])


def _row_branches(row: Row, width: int) -> NDArray[np.int32]:
    """[T] 0 on the prompt, n on the n-th completion."""
    branch_T = np.full(width, _PADDING, np.int32)
    lengths = [row[0].prompt_length, *(sample.trained_tokens for sample in row)]
    branch_T[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return branch_T


def _row_places(row: Row) -> NDArray[np.int64]:
    """Where each trained token is predicted: the first of a completion at the end of the prompt."""
    start = prompt_length = row[0].prompt_length
    places = []
    for sample in row:
        end = start + sample.trained_tokens
        places.append(np.concatenate([[prompt_length - 1], np.arange(start, end - 1)]))
        start = end
    return np.concatenate(places).astype(np.int64)


def _branches(branch_BT: NDArray[np.int32], device: torch.device) -> Branches:
    branch = torch.from_numpy(branch_BT).to(device)
    is_same = branch[:, :, None] == branch[:, None, :]
    is_earlier = torch.ones(is_same.shape[1:], dtype=torch.bool, device=device).tril()
    is_prompt = branch[:, None, :] == 0
    # A token's position is the number of tokens that it sees before it.
    mask_BTT = is_earlier & (is_same | is_prompt)
    return Branches(position_BT=mask_BTT.sum(-1) - 1, mask_B1TT=mask_BTT[:, None])
