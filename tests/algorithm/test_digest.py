"""The digest finds what can go wrong on the way: a bit, a word, a tensor, a bucket."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from azr_async.algorithm.digest import Digest, Sums, digest_for


def checksum(*parts: Tensor) -> int:
    """By sums, as where there is no hash; that the hash finds as much is known."""
    digest = Sums()
    for bytes_N in parts:
        digest.add(bytes_N)
    return digest.value


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


@given(length=some.integers(1, 3000), apart=some.integers(0, 3000), data=some.data())
def test_two_exchanged_tensors_change_the_checksum_even_with_the_same_values(
    length: int, apart: int, data: some.DataObject
) -> None:
    ones = [data.draw(some.integers(0, length - 1)) for _ in range(2)]
    first_W, second_W, between_W = (torch.zeros(words, dtype=torch.int64) for words in (length, length, apart))
    first_W[ones[0]] = second_W[ones[1]] = 0x3F800000
    here, there = (
        checksum(torch.cat(order).view(torch.uint8))
        for order in ([first_W, between_W, second_W], [second_W, between_W, first_W])
    )
    assert (here != there) == (ones[0] != ones[1] and (length + apart) % 1021 != 0)


@given(seed=some.integers(0, 2**31), words=some.lists(some.integers(0, 2000), min_size=3, max_size=3))
def test_the_digest_depends_on_the_order_and_on_every_part(seed: int, words: list[int]) -> None:
    first, second, third = (some_bytes(seed + n, 1 + length) for n, length in enumerate(words))
    every = checksum(first, second, third)
    assert every != checksum(second, first, third)
    assert every != checksum(first, third, second)
    assert every != checksum(first, second)
    assert 0 <= every < 2**128


@pytest.mark.parametrize("new", [Sums, lambda: digest_for(torch.device("cpu"))])
def test_memory_that_is_used_again_does_not_change_what_was_added(new: Callable[[], Digest]) -> None:
    bytes_N = some_bytes(1, 2000)
    digest, other = new(), new()
    digest.add(bytes_N)
    other.add(bytes_N.clone())
    bytes_N.zero_()
    assert digest.value == other.value


def test_on_a_cpu_it_is_the_published_hash_of_all_bytes_in_order() -> None:
    digest = digest_for(torch.device("cpu"))
    assert digest.value == 0x99AA06D3014798D86001C324468D497F  # of nothing, as its specification says
    first, second = some_bytes(1, 100), some_bytes(2, 30)
    digest.add(first)
    digest.add(second)
    whole = digest_for(torch.device("cpu"))
    whole.add(torch.cat([first, second]))
    assert digest.value == whole.value


def mixed(values: Sequence[int]) -> int:
    """By the definition, in Python's integers."""
    total = 0
    for position, value in enumerate([*values, len(values)], 1):
        mixed_value = (value + position * 0x9E3779B97F4A7C15) % 2**64
        mixed_value = (mixed_value ^ (mixed_value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed_value = (mixed_value ^ (mixed_value >> 27)) * 0x94D049BB133111EB % 2**64
        total += mixed_value ^ (mixed_value >> 31)
    return total % 2**64


@pytest.mark.parametrize("words", [1, 1020, 1021, 1022, 130 * 1021 + 3])
def test_the_checksum_is_what_its_definition_says(words: int) -> None:
    words_W = some_bytes(words, words).view(torch.int64)
    whole = words // 1021 * 1021
    rows = [sum(row.tolist()) for row in words_W[:whole].split(1021) if len(row)] + words_W[whole:].tolist()
    columns = [sum(words_W[column:whole:1021].tolist()) for column in range(1021)] if whole else []
    assert checksum(words_W.view(torch.uint8)) == mixed(rows) * 2**64 + mixed(columns)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree() -> None:
    bytes_N = some_bytes(1, 300_000)
    assert checksum(bytes_N.cuda()) == checksum(bytes_N)
