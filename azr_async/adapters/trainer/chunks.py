"""Micro-batches as tensors: samples side by side in padded rows, or one after the other without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from azr_async.adapters.trainer.samples import Sample
from azr_async.algorithm.packing import padded, shared_rows

Row = Sequence[Sample]
"""Samples with the same prompt: on the device the prompt once, then their completions one after the other."""

_PADDING: Final = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Branches:
    """How a completion sees the prompt and itself, but not the other completions of its row."""

    position_BT: Tensor
    mask_B1TT: Tensor
    """bool, [row, 1, from, to]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Where in the one row of a packed micro-batch each sample lies."""

    position_BT: Tensor
    """Begins anew with each sample."""
    bounds_S: Tensor
    """int32, where each sample starts, and the end of the last."""
    longest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A micro-batch on the device: [B, T] tokens, and its N trained ones, one sample's after the other's."""

    ids_BT: Tensor
    attention: Branches | Segments | None
    """None when each row is one sample: plain causal attention."""
    place_N: Tensor
    """Where, in the flattened [B * T], the model predicts the trained token."""
    target_N: Tensor
    temperature_N: Tensor | None
    """None when all are 1."""
    behavior_logp_N: Tensor
    token_version_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor


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
    samples = [sample for row in rows for sample in row]
    branches = None
    if len(samples) > len(rows):
        branches = _branches(rows, width, device)
    return _chunk(
        padded([_row_ids(row) for row in rows], width),
        branches,
        np.concatenate([index * width + _row_places(row) for index, row in enumerate(rows)]),
        samples,
        device,
    )


def packed_chunk_of(samples: Sequence[Sample], device: torch.device) -> Chunk:
    """Put samples one after the other into one row, without padding."""
    lengths = [len(sample.token_ids) for sample in samples]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    position_T = np.concatenate([np.arange(length) for length in lengths])
    segments = Segments(
        position_BT=torch.from_numpy(position_T[None]).to(device),
        bounds_S=torch.from_numpy(bounds.astype(np.int32)).to(device),
        longest=max(lengths),
    )
    places = [start + _row_places([sample]) for start, sample in zip(bounds[:-1], samples, strict=True)]
    ids_T = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    return _chunk(ids_T[None], segments, np.concatenate(places), samples, device)


def _chunk(
    ids_BT: NDArray[np.int64],
    attention: Branches | Segments | None,
    place_N: NDArray[np.int64],
    samples: Sequence[Sample],
    device: torch.device,
) -> Chunk:
    counts, temperatures = zip(*((sample.trained_tokens, sample.temperature) for sample in samples), strict=True)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, np.float32), counts)).to(device)

    def completions(arrays: list[Any]) -> Tensor:
        parts = [array[sample.prompt_length :] for array, sample in zip(arrays, samples, strict=True)]
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return Chunk(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        attention=attention,
        place_N=torch.from_numpy(place_N).to(device),
        target_N=completions([sample.token_ids for sample in samples]).long(),
        temperature_N=per_token(temperatures) if any(one != 1.0 for one in temperatures) else None,
        behavior_logp_N=completions([sample.behavior_logp for sample in samples]),
        token_version_N=completions([sample.token_version for sample in samples]),
        advantage_N=per_token([sample.advantage for sample in samples]),
        weight_N=per_token([sample.weight for sample in samples]),
    )


def _row_ids(row: Row) -> NDArray[np.int32]:
    return np.concatenate([row[0].token_ids, *(sample.token_ids[sample.prompt_length :] for sample in row[1:])])


def _row_places(row: Row) -> NDArray[np.int64]:
    """Where each trained token is predicted: the first of a completion at the end of the prompt."""
    start = prompt_length = row[0].prompt_length
    places = []
    for sample in row:
        end = start + sample.trained_tokens
        places.append(np.concatenate([[prompt_length - 1], np.arange(start, end - 1)]))
        start = end
    joined: NDArray[np.int64] = np.concatenate(places).astype(np.int64)
    return joined


def _branches(rows: Sequence[Row], width: int, device: torch.device) -> Branches:
    position_BT = np.zeros((len(rows), width), np.int64)
    branch_BT = np.full((len(rows), width), _PADDING, np.int32)  # 0 on the prompt, n on the n-th completion
    for position_T, branch_T, row in zip(position_BT, branch_BT, rows, strict=True):
        prompt, *completions = lengths = [row[0].prompt_length, *(sample.trained_tokens for sample in row)]
        branch_T[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
        # A token's position is the number of tokens that it sees before it.
        ends = [np.arange(prompt), *(np.arange(prompt, prompt + length) for length in completions)]
        position_T[: sum(lengths)] = np.concatenate(ends)
    branch = torch.from_numpy(branch_BT).to(device)
    mask_BTT = branch[:, :, None] == branch[:, None, :]
    mask_BTT |= (branch == 0)[:, None, :]
    mask_BTT &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return Branches(position_BT=torch.from_numpy(position_BT).to(device), mask_B1TT=mask_BTT[:, None])
