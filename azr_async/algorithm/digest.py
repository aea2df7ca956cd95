"""An order-sensitive checksum of tensors' bytes, computed where the tensors are.

Every 8-byte word is mixed with its position before it is added up, so exchanged words, and with them exchanged tensors,
give another sum. One word changed, if only by a bit, always does: the mixing is one-to-one.
"""

from typing import Final

import torch
from torch import Tensor

_MASK: Final = 2**64 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_BLOCK_WORDS: Final = 2**22
"""Words mixed at a time; bounds the extra memory at a few times 32 MiB."""


def checksum(bytes_N: Tensor) -> int:
    """64 bits over [N] uint8, N a multiple of 8: wraparound sum over words w_i of mix(w_i + (i + 1) * golden ratio).

    mix is SplitMix64's (Steele, Lea and Flood 2014), in signed integers, which is what torch has.
    """
    words_N = bytes_N.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=bytes_N.device)
    for start in range(0, len(words_N), _BLOCK_WORDS):
        block_B = words_N[start : start + _BLOCK_WORDS]
        position_B = torch.arange(start + 1, start + 1 + len(block_B), dtype=torch.int64, device=bytes_N.device)
        total += _mixed_words(block_B + position_B * _signed(_GOLDEN)).sum()
    return int(total.item()) & _MASK


def chained(digest: int, part_checksum: int) -> int:
    """The digest of everything so far and one part more; depends on the order of parts."""
    value = (digest * _GOLDEN + part_checksum + 1) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mixed_words(word_B: Tensor) -> Tensor:
    word_B = (word_B ^ _shifted(word_B, 30)) * _signed(_FIRST)
    word_B = (word_B ^ _shifted(word_B, 27)) * _signed(_SECOND)
    return word_B ^ _shifted(word_B, 31)


def _shifted(word_B: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift would copy the sign."""
    return torch.bitwise_right_shift(word_B, bits).bitwise_and(2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
