"""A 128-bit digest of tensors' bytes, order-sensitive, computed where the tensors are, as fast as they can be read.

On CPUs it is XXH3 (Collet, https://xxhash.com). On other devices, for which there is none, sums have to do: the 8-byte
words of each part are laid out in rows, and every row and every column is added up. Only these few sums are
mixed with their positions and added again: 64 bits from the rows, 64 from the columns. One word changed, if only by a
bit, always gives another digest: its row has another sum, and the mixing is one-to-one. Exchanged words, and with them
exchanged tensors, do as well: they change sums of rows, or of columns, or both. What would pass are several changes
that cancel each other in every row and in every column of a part; a row's length is prime, so that tensors of the usual
sizes do not begin in the same column.
"""

from typing import Final, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

_MASK: Final = 2**64 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_ROW_WORDS: Final = 1021
_WAITING_SUMS: Final = 2**16
"""Sums that are mixed at a time: to mix few costs as much."""


class Digest(Protocol):
    """Of parts in their order. All who compare theirs compute them on devices of one type, from equal parts."""

    def add(self, bytes_N: Tensor) -> None:
        """One part, [N] uint8, N a multiple of 8. It has been read when this returns."""

    @property
    def value(self) -> int:
        """128 bits."""


def digest_for(device: torch.device) -> Digest:
    """An empty one, for parts on `device`."""
    return _Hash() if device.type == "cpu" else Sums()


class _Hash:
    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, bytes_N: Tensor) -> None:
        self._hash.update(bytes_N.numpy().data)

    @property
    def value(self) -> int:
        return int(self._hash.intdigest())


class Sums:
    """Sums over rows and columns of words; see above."""

    def __init__(self) -> None:
        self._rows = _Mixed()
        self._columns = _Mixed()

    def add(self, bytes_N: Tensor) -> None:
        """One part. Words that fill no row count as rows by themselves."""
        words_N = bytes_N.view(torch.int64)
        whole = len(words_N) // _ROW_WORDS * _ROW_WORDS
        if whole:
            words_RC = words_N[:whole].view(-1, _ROW_WORDS)
            self._rows.add(words_RC.sum(1))
            self._columns.add(words_RC.sum(0))
        # A copy: the caller's memory may be filled with other bytes before this is mixed.
        self._rows.add(words_N[whole:].clone())

    @property
    def value(self) -> int:
        """128 bits: 2^64 times those of the rows, plus those of the columns."""
        return self._rows.value << 64 | self._columns.value


class _Mixed:
    """The sum of mix(s_i + i * golden ratio) over all sums s_i added so far, i from 1; additions wrap around.

    mix is SplitMix64's (Steele, Lea and Flood 2014). The number of sums is mixed in like a last one: zeros count.
    """

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._waiting_sums = self._mixed_sums = self._total = 0

    def add(self, sum_S: Tensor) -> None:
        self._waiting.append(sum_S)
        self._waiting_sums += len(sum_S)
        if self._waiting_sums >= _WAITING_SUMS:
            self._mix()

    @property
    def value(self) -> int:
        self._mix()
        return (self._total + _mixed_total(np.array([self._mixed_sums], np.uint64), self._mixed_sums)) & _MASK

    def _mix(self) -> None:
        if self._waiting:
            sum_S = torch.cat(self._waiting).cpu().numpy().view(np.uint64)
            self._total += _mixed_total(sum_S, self._mixed_sums)
            self._mixed_sums += self._waiting_sums
            self._waiting, self._waiting_sums = [], 0


def _mixed_total(sum_S: NDArray[np.uint64], before: int) -> int:
    mixed_S = sum_S + np.arange(before + 1, before + 1 + len(sum_S), dtype=np.uint64) * np.uint64(_GOLDEN)
    mixed_S = (mixed_S ^ (mixed_S >> np.uint64(30))) * np.uint64(_FIRST)
    mixed_S = (mixed_S ^ (mixed_S >> np.uint64(27))) * np.uint64(_SECOND)
    return int((mixed_S ^ (mixed_S >> np.uint64(31))).sum())
