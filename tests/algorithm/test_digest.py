"""The digest finds what can go wrong on the way: a bit, a word, a tensor, a bucket."""

import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from azr_async.algorithm.digest import chained, checksum

sums = some.integers(0, 2**64 - 1)


def some_bytes(seed: int, words: int) -> Tensor:
    return torch.randint(0, 256, (8 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(seed=some.integers(0, 2**31), words=some.integers(1, 200), data=some.data())
def test_one_flipped_bit_changes_the_checksum(seed: int, words: int, data: some.DataObject) -> None:
    bytes_N = some_bytes(seed, words)
    flipped_N = bytes_N.clone()
    flipped_N[data.draw(some.integers(0, 8 * words - 1))] ^= 1 << data.draw(some.integers(0, 7))
    assert checksum(flipped_N) != checksum(bytes_N)


@given(seed=some.integers(0, 2**31), words=some.integers(2, 200), data=some.data())
def test_two_exchanged_words_change_the_checksum(seed: int, words: int, data: some.DataObject) -> None:
    words_W = some_bytes(seed, words).view(torch.int64)
    first = data.draw(some.integers(0, words - 2))
    second = data.draw(some.integers(first + 1, words - 1))
    exchanged_W = words_W.clone()
    exchanged_W[[first, second]] = words_W[[second, first]]
    assert (checksum(exchanged_W.view(torch.uint8)) != checksum(words_W.view(torch.uint8))) == bool(
        words_W[first] != words_W[second]
    )


@given(words=some.integers(2, 200), data=some.data())
def test_exchanged_words_that_differ_in_high_bits_only_are_told_apart(words: int, data: some.DataObject) -> None:
    words_W = torch.zeros(words, dtype=torch.int64)
    first = data.draw(some.integers(0, words - 1))
    second = data.draw(some.integers(0, words - 1).filter(lambda place: place != first))
    here_W, there_W = words_W.clone(), words_W.clone()
    here_W[first] = there_W[second] = 1 << 62
    assert checksum(here_W.view(torch.uint8)) != checksum(there_W.view(torch.uint8))


@given(seed=some.integers(0, 2**31), words=some.integers(1, 200))
def test_zeros_at_the_end_count(seed: int, words: int) -> None:
    bytes_N = some_bytes(seed, words)
    assert checksum(torch.cat([bytes_N, torch.zeros(8, dtype=torch.uint8)])) != checksum(bytes_N)


@given(digest=sums, first=sums, second=sums)
def test_the_chain_depends_on_the_order_and_on_every_part(digest: int, first: int, second: int) -> None:
    both = chained(chained(digest, first), second)
    assert (both == chained(chained(digest, second), first)) == (first == second)
    assert both != chained(digest, first)
    assert 0 <= both < 2**64


def test_the_checksum_is_the_same_however_it_is_cut_into_blocks() -> None:
    words = 2**22 + 3
    words_W = torch.arange(words)
    golden = 0x9E3779B97F4A7C15 - 2**64
    mixed_W = words_W + (torch.arange(words) + 1) * golden
    mixed_W = (mixed_W ^ ((mixed_W >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    mixed_W = (mixed_W ^ ((mixed_W >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    mixed_W = mixed_W ^ ((mixed_W >> 31) & (2**33 - 1))
    assert checksum(words_W.view(torch.uint8)) == int(mixed_W.sum()) % 2**64
