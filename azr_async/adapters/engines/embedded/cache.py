"""Key-value cache of all running sequences: one row each, all of them ending at the same column.

Positions go into the model by number, so the column in which a key stands is free to choose. We let every row end at
the shared column `end`: the new token of all rows is then one plain slice, and so is the attended part,
[end - longest, end]. When `end` reaches the wall everything moves back left, once in many steps.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from azr_async.errors import EngineError

_SLACK_COLUMNS: Final = 64


class SlotLayer:
    """One model layer's keys and values; takes the place of a transformers cache layer."""

    is_sliding = False
    is_compileable = False

    def __init__(self, example_keys: Tensor, example_values: Tensor, slots: int, columns: int) -> None:
        self.keys = example_keys.new_zeros(slots, example_keys.shape[1], columns, example_keys.shape[3])
        self.values = example_values.new_zeros(slots, example_values.shape[1], columns, example_values.shape[3])
        self.rows = 0
        self.first = 0
        self.end = 0

    def update(
        self, keys_BK1D: Tensor, values_BK1D: Tensor, *_unused: object, **_ignored: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new token at column `end`, give back all that is attended: [B, K, end + 1 - first, D] twice."""
        self.keys[: self.rows, :, self.end : self.end + 1] = keys_BK1D
        self.values[: self.rows, :, self.end : self.end + 1] = values_BK1D
        attended = slice(self.first, self.end + 1)
        return self.keys[: self.rows, :, attended], self.values[: self.rows, :, attended]

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return self.end - self.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended."""
        return self.end - self.first + query_length, 0


class SlotCache:
    """The layers together, and which rows and columns of them are in use."""

    def __init__(self, example: DynamicCache, *, slots: int, context_tokens: int) -> None:
        """Take the shapes from a cache that the model has just filled."""
        self._columns = context_tokens + _SLACK_COLUMNS
        self._layers = [SlotLayer(*_filled(layer), slots, self._columns) for layer in example.layers]
        self.rows = 0
        """Rows in use: 0 .. rows - 1."""
        self.end = 0
        """Column of the next token, the same for all rows."""

    def append(self, prompts: DynamicCache, source_B: Tensor, length: int, longest: int) -> None:
        """Add rows: row b is a copy of row source_B[b] of a cache whose sequences end at column `length`.

        `longest` is the number of cached tokens of the longest row in use, the new ones included.
        """
        self._make_room(length, longest)
        rows = slice(self.rows, self.rows + len(source_B))
        for layer, prompt in zip(self._layers, prompts.layers, strict=True):
            keys_PKTD, values_PKTD = _filled(prompt)
            layer.keys[rows, :, self.end - length : self.end] = keys_PKTD[source_B]
            layer.values[rows, :, self.end - length : self.end] = values_PKTD[source_B]
        self.rows += len(source_B)

    def append_empty(self, rows: int) -> None:
        """Have `rows` rows; nothing is cached yet for those that are new."""
        self.rows = rows

    def replace(self, contents: DynamicCache, rows_B: Tensor, length: int) -> None:
        """Write rows anew from a cache whose sequences end at column `length`."""
        for layer, content in zip(self._layers, contents.layers, strict=True):
            keys_BKTD, values_BKTD = _filled(content)
            layer.keys[rows_B, :, self.end - length : self.end] = keys_BKTD
            layer.values[rows_B, :, self.end - length : self.end] = values_BKTD

    def compact(self, holes_B: NDArray[np.int64], movers_B: NDArray[np.int64], rows: int, longest: int) -> None:
        """Move rows into the holes that ended sequences left; `rows` remain."""
        if len(holes_B):
            holes, movers = torch.from_numpy(holes_B), torch.from_numpy(movers_B)
            columns = slice(self.end - longest, self.end)
            for layer in self._layers:
                for store in (layer.keys, layer.values):
                    store[holes, :, columns] = store[movers, :, columns]
        self.rows = rows
        if rows == 0:
            self.end = 0

    def attend(self, longest: int) -> Cache:
        """For one forward pass of one new token per row: what transformers sees as its cache."""
        self._make_room(longest, longest)
        for layer in self._layers:
            layer.rows, layer.first, layer.end = self.rows, self.end - longest, self.end
        return Cache(layers=self._layers)

    def advance(self) -> None:
        """The forward pass has filled column `end`."""
        self.end += 1

    def _make_room(self, needed: int, longest: int) -> None:
        """Let `needed` columns lie before `end`, and one at it."""
        if needed <= self.end < self._columns:
            return
        new_end = max(needed, longest)
        for layer in self._layers if self.rows else ():
            for store in (layer.keys, layer.values):
                moved = min(longest, self.end)
                store[: self.rows, :, new_end - moved : new_end] = store[
                    : self.rows, :, self.end - moved : self.end
                ].clone()
        self.end = new_end


def _filled(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    """Keys and values of a transformers cache layer, [B, K, T, D] each."""
    keys, values = layer.keys, layer.values
    if keys is None or keys.dim() != 4 or values is None or values.dim() != 4:
        raise EngineError(
            f"the model keeps a {type(layer).__name__} of another form than keys and values per token. "
            "The embedded engine serves causal models with full attention in every layer; choose such a model."
        )
    return keys, values


def prefill_order(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Batches of sequences of similar length, each of a padded size within `most_tokens` or of one sequence."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
