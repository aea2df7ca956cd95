"""Packed micro-batches: sequences one after the other up to a token budget, rank beside rank with equal work.

Sharded ranks compute in step: each collective waits for the slowest. So the plan is made of rounds, in which every rank
has one micro-batch, and it is the micro-batches of a round that must cost the same.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bin = tuple[int, ...]
"""Indices into the lengths that were packed; empty for a rank that sits a round out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a sequence of l tokens costs, in tokens: l + quadratic * l^2, with causal attention as the second term."""

    quadratic: float = 0.0

    def of(self, lengths: Sequence[int]) -> NDArray[np.float64]:
        """[n] tokens."""
        length_n = np.asarray(lengths, np.float64)
        return length_n + self.quadratic * length_n**2


def attention_cost(*, layers: int, attention_width: int, weights: int) -> Cost:
    """The second term from the shape of a transformer.

    A token takes 2 * weights operations forward, and 4 * attention_width * layers for each token that it attends to
    (query with key, share with value), on average half of the sequence.

    Args:
        attention_width: heads times the width of a head.
        weights: parameters without the embedding.
    """
    return Cost(quadratic=layers * attention_width / max(weights, 1))


def balanced_bins(
    lengths: Sequence[int], *, limit_tokens: int, ranks: int = 1, cost: Cost | None = None
) -> tuple[tuple[Bin, ...], ...]:
    """Fill as few micro-batches as possible: one tuple per rank, equally long, the same answer on every rank.

    The costliest sequence goes first, always into the cheapest micro-batch that has room (Graham 1969, longest
    processing time). Micro-batches of similar cost then meet in one round.

    Args:
        lengths: [n] tokens of each sequence, at least 1.
        limit_tokens: most tokens of a micro-batch. A longer sequence travels alone.

    Returns:
        `ranks` tuples; every sequence is in exactly one micro-batch.
    """
    costs = (cost or Cost()).of(lengths)
    order = sorted(range(len(lengths)), key=lambda index: (-costs[index], index))
    rounds = -(-sum(min(length, limit_tokens) for length in lengths) // (limit_tokens * ranks))
    while (bins := _filled(order, lengths, costs, limit_tokens, rounds * ranks)) is None:
        rounds += 1
    return _dealt(bins, [float(costs[list(members)].sum()) for members in bins], ranks)


def waiting_share(costs: Sequence[Sequence[float]]) -> float:
    """Share of the ranks' time in which they wait for the slowest of their round; 0 when nothing is computed.

    Args:
        costs: of each rank's micro-batches in turn; a rank that has fewer than the others sits the last rounds out.
    """
    rounds = itertools.zip_longest(*costs, fillvalue=0.0)
    available = sum(map(max, rounds)) * len(costs)
    return float(1.0 - sum(map(sum, costs)) / available) if available else 0.0


def _filled(
    order: Sequence[int], lengths: Sequence[int], costs: NDArray[np.float64], limit_tokens: int, count: int
) -> list[Bin] | None:
    """None when a sequence finds no room in `count` bins."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, load = np.zeros(count, np.int64), np.zeros(count)
    for index in order:
        has_room = (tokens + lengths[index] <= limit_tokens) | (tokens == 0)
        if not has_room.any():
            return None
        chosen = int(np.where(has_room, load, np.inf).argmin())
        bins[chosen].append(index)
        tokens[chosen] += lengths[index]
        load[chosen] += costs[index]
    return [tuple(members) for members in bins]


def _dealt(bins: Sequence[Bin], costs: Sequence[float], ranks: int) -> tuple[tuple[Bin, ...], ...]:
    """Round by round the next costliest, the costliest of a round to the rank that has least so far."""
    order = sorted(range(len(bins)), key=lambda number: (-costs[number], number))
    plan: list[list[Bin]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, len(order), ranks):
        idlest = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for number, rank in zip(order[start : start + ranks], idlest, strict=True):
            plan[rank].append(bins[number])
            load[rank] += costs[number]
    return tuple(map(tuple, plan))
