"""Micro-batches: complete, within the limit, deterministic, balanced, with little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.packing import MicroBatch, pack, padded, shared_rows, waste

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@given(lengths=LENGTHS, limit=st.integers(1, 400), ranks=st.integers(1, 4))
def test_every_sequence_is_packed_once_and_within_the_limit(lengths: list[int], limit: int, ranks: int) -> None:
    plan = pack(lengths, limit_tokens=limit, ranks=ranks)
    assert len(plan) == ranks
    batches = [batch for batches in plan for batch in batches]
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(lengths)))
    assert all(batch.padded_tokens <= limit or len(batch.members) == 1 for batch in batches)
    assert all(batch.width == max(lengths[member] for member in batch.members) for batch in batches)


@given(lengths=LENGTHS, ranks=st.integers(1, 4))
def test_no_rank_has_more_than_one_sequence_more_to_do(lengths: list[int], ranks: int) -> None:
    plan = pack(lengths, limit_tokens=200, ranks=ranks)
    loads = [sum(lengths[member] for batch in batches for member in batch.members) for batches in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def cheapest_by_search(lengths: list[int], limit: int, launch: int) -> int:
    """The least cost over every way to cut the sorted sequences."""
    ordered = sorted(lengths, reverse=True)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        bounds = [0, *(place + 1 for place, is_cut in enumerate(cuts) if is_cut), len(ordered)]
        groups = [ordered[start:end] for start, end in itertools.pairwise(bounds)]
        if all(group[0] * len(group) <= limit or len(group) == 1 for group in groups):
            costs.append(sum(group[0] * len(group) + launch for group in groups))
    return min(costs)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    limit=st.integers(10, 120),
    launch=st.integers(0, 40),
)
def test_no_other_cut_is_cheaper(lengths: list[int], limit: int, launch: int) -> None:
    (batches,) = pack(lengths, limit_tokens=limit, launch_tokens=launch)
    cost = sum(batch.padded_tokens + launch for batch in batches)
    assert cost == cheapest_by_search(lengths, limit, launch)


def test_padding_stays_small_on_lengths_of_the_starter() -> None:
    lengths = np.random.default_rng(0).integers(12, 60, 300).tolist()
    assert waste(pack(lengths, limit_tokens=4096), lengths) < 0.1


def test_sequences_are_padded_on_the_right() -> None:
    rows = padded([np.array([1, 2, 3], np.int32), np.array([4], np.int32)], 3)
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_waste_by_hand() -> None:
    plan = ((MicroBatch(members=(0, 1), width=10),),)
    assert waste(plan, [10, 5]) == pytest.approx(0.25)
    assert waste(((),), []) == 0.0


PROMPTS = st.lists(st.sampled_from([(1,), (1, 2), (3, 4, 5)]), max_size=20)


@given(prompts=PROMPTS, data=st.data(), limit=st.integers(1, 40))
def test_shared_rows_hold_every_completion_once_under_its_own_prompt(
    prompts: list[tuple[int, ...]], data: st.DataObject, limit: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(prompts), max_size=len(prompts)))
    rows = shared_rows([np.array(prompt, np.int32) for prompt in prompts], lengths, limit_tokens=limit)
    assert sorted(index for row in rows for index in row) == list(range(len(prompts)))
    for row in rows:
        assert len({prompts[index] for index in row}) == 1
        tokens = len(prompts[row[0]]) + sum(lengths[index] for index in row)
        assert tokens <= limit or len(row) == 1


def test_attempts_at_one_prompt_share_a_row_across_groups() -> None:
    one, other = np.array([1, 2, 3], np.int32), np.array([1, 2], np.int32)
    assert shared_rows([one, other, one.copy(), one], [2, 2, 2, 2], limit_tokens=100) == [(0, 2, 3), (1,)]
    assert shared_rows([one, one, one], [2, 2, 2], limit_tokens=7) == [(0, 1), (2,)]
