"""Packed micro-batches: complete, within the budget, few, and rank beside rank of equal cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.bins import Cost, attention_cost, balanced_bins, waiting_share

LENGTHS = st.lists(st.integers(1, 100), max_size=60)
QWEN_7B = attention_cost(layers=28, attention_width=3584, weights=7_070_000_000)


@given(lengths=LENGTHS, limit=st.integers(1, 400), ranks=st.integers(1, 5), quadratic=st.sampled_from([0.0, 0.1]))
def test_every_sequence_is_packed_once_and_within_the_budget(
    lengths: list[int], limit: int, ranks: int, quadratic: float
) -> None:
    plan = balanced_bins(lengths, limit_tokens=limit, ranks=ranks, cost=Cost(quadratic=quadratic))
    assert len(plan) == ranks
    assert len({len(bins) for bins in plan}) == 1
    members = [member for bins in plan for members in bins for member in members]
    assert sorted(members) == list(range(len(lengths)))
    for bins in plan:
        for packed in bins:
            assert sum(lengths[member] for member in packed) <= limit or len(packed) == 1


@given(lengths=LENGTHS, ranks=st.integers(1, 5))
def test_no_round_is_without_work(lengths: list[int], ranks: int) -> None:
    plan = balanced_bins(lengths, limit_tokens=150, ranks=ranks)
    assert all(any(bins[number] for bins in plan) for number in range(len(plan[0])))


def azr_lengths(kind: str, count: int = 384) -> list[int]:
    generator = np.random.default_rng(0)
    if kind == "paper":
        prompts = generator.lognormal(6.8, 0.7, count).clip(200, 6144)
        completions = generator.lognormal(6.5, 1.0, count).clip(30, 8096)
    else:
        prompts = generator.integers(4000, 6145, count)
        completions = generator.integers(2000, 8097, count)
    return [int(length) for length in prompts + completions]


@pytest.mark.parametrize("kind", ["paper", "long"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_wait_for_each_other_less_than_a_hundredth_of_the_time(kind: str, ranks: int) -> None:
    lengths = azr_lengths(kind)
    plan = balanced_bins(lengths, limit_tokens=16384, ranks=ranks, cost=QWEN_7B)
    costs = QWEN_7B.of(lengths)
    assert waiting_share([[costs[list(members)].sum() for members in bins] for bins in plan]) < 0.01


def test_attention_of_a_7b_model_costs_a_fifth_more_at_14_thousand_tokens() -> None:
    assert QWEN_7B.of([14000])[0] == pytest.approx(1.2 * 14000, rel=0.01)


def test_waiting_by_hand() -> None:
    assert waiting_share([[4.0, 2.0], [2.0]]) == pytest.approx(1 - 8 / 12)
    assert waiting_share([[3.0], [3.0]]) == 0.0
    assert waiting_share([[], []]) == 0.0
