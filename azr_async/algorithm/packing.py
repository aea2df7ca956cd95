"""Which sequences are computed together: micro-batches with little padding, balanced over the learner's ranks."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

LAUNCH_TOKENS: Final = 128
"""What one more micro-batch costs, in tokens of computing time; fewer, wider micro-batches win below it."""

SHARED_ROW_TOKENS: Final = 1024
"""Longest row that several completions share: its attention mask takes the square of that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences that go through the model side by side, right-padded to `width`."""

    members: tuple[int, ...]
    """Indices into the lengths that were packed."""
    width: int
    """Tokens of the longest member."""

    @property
    def padded_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.width * len(self.members)


def pack(
    lengths: Sequence[int], *, limit_tokens: int, ranks: int = 1, launch_tokens: int = LAUNCH_TOKENS
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Cut a batch into micro-batches: one tuple of them per rank, the same answer on every rank.

    Sequences are dealt out from the longest to whichever rank has least to do; each rank then cuts its own, sorted
    by length, where the sum of padding and launch cost is smallest.

    Args:
        lengths: [n] tokens of each sequence, at least 1.
        limit_tokens: most tokens of a micro-batch, padding included. A longer sequence travels alone.

    Returns:
        `ranks` tuples; a rank may be left without work. Every sequence is in exactly one micro-batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for index in order:
        tokens, rank = load[0]
        shares[rank].append(index)
        heapq.heapreplace(load, (tokens + lengths[index], rank))
    return tuple(_cut(share, lengths, limit_tokens, launch_tokens) for share in shares)


def shared_rows(
    prompts: Sequence[NDArray[np.int32]], completion_lengths: Sequence[int], *, limit_tokens: int
) -> list[tuple[int, ...]]:
    """Put completions of the same prompt into one row: the prompt once, then one completion after the other.

    Attempts at one task repeat its prompt, which for short answers is most of the work.

    Args:
        prompts: [n] token ids; equal ids are the same prompt, whatever group they belong to.
        completion_lengths: [n] tokens of each completion.
        limit_tokens: most tokens of a row; a longer completion has a row of its own.

    Returns:
        Indices of the completions in each row, in order of appearance.
    """
    limit = min(limit_tokens, SHARED_ROW_TOKENS)
    rows: list[list[int]] = []
    row_of: dict[bytes, int] = {}
    tokens: list[int] = []
    for index, (prompt, length) in enumerate(zip(prompts, completion_lengths, strict=True)):
        row = row_of.get(prompt.tobytes())
        if row is None or tokens[row] + length > limit:
            row = row_of[prompt.tobytes()] = len(rows)
            rows.append([])
            tokens.append(len(prompt))
        rows[row].append(index)
        tokens[row] += length
    return [tuple(row) for row in rows]


def padded(sequences: Sequence[NDArray[np.int32]], width: int) -> NDArray[np.int64]:
    """[B, T] the sequences as rows, filled up with 0 on the right. A causal model never looks at the padding."""
    ids_BT = np.zeros((len(sequences), width), np.int64)
    for row, sequence in zip(ids_BT, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids_BT


def waste(plan: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> float:
    """Share of the computed tokens that is padding; 0 when nothing is computed."""
    computed = sum(batch.padded_tokens for batches in plan for batch in batches)
    useful = sum(lengths[member] for batches in plan for batch in batches for member in batch.members)
    return 1.0 - useful / computed if computed else 0.0


def _cut(share: list[int], lengths: Sequence[int], limit_tokens: int, launch_tokens: int) -> tuple[MicroBatch, ...]:
    """The cheapest cut of sequences sorted by falling length; dynamic programme over where the last one starts."""
    width_n = np.array([lengths[index] for index in share], np.int64)
    cost = np.zeros(len(share) + 1)
    start_of = np.zeros(len(share) + 1, np.int64)
    for end in range(1, len(share) + 1):
        starts = np.arange(end)
        tokens = width_n[:end] * (end - starts)
        allowed = (tokens <= limit_tokens) | (starts == end - 1)
        costs = np.where(allowed, cost[:end] + tokens + launch_tokens, np.inf)
        start_of[end] = costs.argmin()
        cost[end] = costs[start_of[end]]
    batches: list[MicroBatch] = []
    end = len(share)
    while end:
        start = int(start_of[end])
        batches.append(MicroBatch(members=tuple(share[start:end]), width=int(width_n[start])))
        end = start
    return tuple(reversed(batches))
