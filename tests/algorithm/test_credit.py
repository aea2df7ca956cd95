"""Rewards of the proposer, TRR++ advantages, and the weight of a token in the loss."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from azr_async.algorithm.credit import learnability, shuffled_within_cells, task_relative_advantages, token_weights

Mode = Literal["sample", "token"]
Aggregation = Literal["token", "sequence"]
CellWeights = Literal["tokens", "equal"]
Batch = tuple[list[float], list[int], list[str]]

MODES: st.SearchStrategy[Mode] = st.sampled_from(["sample", "token"])
REWARDS = st.sampled_from([-1.0, -0.5, 0.0, 0.125, 0.5, 0.875, 1.0])


@st.composite
def batches(draw: st.DrawFn, least: int = 1) -> Batch:
    count = draw(st.integers(least, 30))
    rewards = draw(st.lists(REWARDS, min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    cells = draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    return rewards, lengths, cells


def plainly(rewards: list[float], lengths: list[int], cells: list[str], mode: Mode) -> NDArray[np.float64]:
    """The definition, written out: every token (or sample) is one observation of its cell."""
    advantages = []
    for reward, cell in zip(rewards, cells, strict=True):
        observed = [
            r
            for r, n, c in zip(rewards, lengths, cells, strict=True)
            if c == cell
            for _ in range(n if mode == "token" else 1)
        ]
        mean = sum(observed) / len(observed)
        freedom = max(len(observed) - 1, 1) if mode == "token" else len(observed)
        variance = sum((r - mean) ** 2 for r in observed) / freedom
        advantages.append((reward - mean) / (variance + 1e-8) ** 0.5)
    return np.array(advantages)


@pytest.mark.parametrize(("successes", "expected"), [(0, -0.5), (1, 0.875), (4, 0.5), (7, 0.125), (8, -0.5)])
def test_a_proposal_earns_most_when_it_is_hard_but_solved(successes: int, expected: float) -> None:
    assert learnability(successes, 8, -0.5) == expected


@pytest.mark.parametrize(("successes", "attempts"), [(-1, 8), (9, 8), (0, 0)])
def test_impossible_counts_are_refused(successes: int, attempts: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        learnability(successes, attempts, 0.0)


@given(attempts=st.integers(1, 32), extreme=st.floats(-1, 0))
def test_learnability_falls_with_every_further_success(attempts: int, extreme: float) -> None:
    inner = [learnability(successes, attempts, extreme) for successes in range(1, attempts)]
    assert inner == sorted(inner, reverse=True)
    assert all(0 < reward < 1 for reward in inner)


@pytest.mark.parametrize(
    ("rewards", "lengths", "expected"),
    [
        ([1, -1], [10, 30], [1.7102631, -0.5700877]),
        ([1, -0.5, -1, 0.875], [4, 8, 16, 2], [1.9400889, -0.0328829, -0.6905401, 1.7756746]),
        ([1, 1, 1], [5, 6, 7], [0, 0, 0]),
    ],
)
def test_token_mode_gives_what_the_published_code_gives(
    rewards: list[float], lengths: list[int], expected: list[float]
) -> None:
    advantages, _ = task_relative_advantages(rewards, lengths, ["solve"] * len(rewards), "token")
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_sample_mode_by_hand() -> None:
    advantages, stats = task_relative_advantages([1, 1, -0.5, -1], [1, 2, 3, 4], ["a", "a", "a", "b"], "sample")
    np.testing.assert_allclose(advantages, [0.5**0.5, 0.5**0.5, -(2**0.5), 0.0], atol=1e-7)
    assert (stats["a"].count, stats["a"].mean) == (3, 0.5)
    assert (stats["b"].count, stats["b"].mean, stats["b"].std) == (1, -1.0, 0.0)


@given(batch=batches(), mode=MODES)
def test_advantages_equal_their_definition(batch: Batch, mode: Mode) -> None:
    advantages, _ = task_relative_advantages(*batch, mode)
    np.testing.assert_allclose(advantages, plainly(*batch, mode), atol=1e-9)


@given(batch=batches(), mode=MODES)
def test_the_weighted_mean_of_every_cell_is_zero(batch: Batch, mode: Mode) -> None:
    advantages, stats = task_relative_advantages(*batch, mode)
    weights = np.array(batch[1]) if mode == "token" else np.ones(len(batch[1]))
    cells = np.array(batch[2])
    sums = [(advantages * weights)[cells == cell].sum() for cell in stats]
    np.testing.assert_allclose(sums, 0.0, atol=1e-7)


@given(batch=batches(), mode=MODES, shift=st.floats(-5, 5))
def test_adding_a_constant_to_all_rewards_changes_nothing(batch: Batch, mode: Mode, shift: float) -> None:
    rewards, lengths, cells = batch
    plain, _ = task_relative_advantages(rewards, lengths, cells, mode)
    shifted, _ = task_relative_advantages(np.array(rewards) + shift, lengths, cells, mode)
    np.testing.assert_allclose(shifted, plain, atol=1e-6)


@given(batch=batches(), mode=MODES, seed=st.integers(0, 2**31))
def test_the_order_of_the_rollouts_does_not_matter(batch: Batch, mode: Mode, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(batch[0]))
    permuted = tuple([column[index] for index in order] for column in batch)
    plain, _ = task_relative_advantages(*batch, mode)
    there, _ = task_relative_advantages(*permuted, mode)
    np.testing.assert_allclose(there, plain[order], atol=1e-9)


@given(
    reward=st.floats(-1e6, 1e6),
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    mode=MODES,
)
def test_a_cell_of_equal_rewards_gets_exactly_zero(reward: float, lengths: list[int], mode: Mode) -> None:
    advantages, _ = task_relative_advantages([reward] * len(lengths), lengths, ["x"] * len(lengths), mode)
    assert (advantages == 0.0).all()


@given(batch=batches(), seed=st.integers(0, 1000))
def test_shuffling_keeps_the_rewards_of_every_cell(batch: Batch, seed: int) -> None:
    rewards, _, cells = batch
    shuffled = shuffled_within_cells(rewards, cells, (seed, 3))
    names = np.array(cells)
    for cell in set(cells):
        assert sorted(shuffled[names == cell]) == sorted(np.array(rewards)[names == cell])
    np.testing.assert_array_equal(shuffled, shuffled_within_cells(rewards, cells, (seed, 3)))


def test_shuffling_depends_on_the_version() -> None:
    rewards, cells = np.arange(50.0), ["a"] * 50
    assert (shuffled_within_cells(rewards, cells, (1, 1)) != shuffled_within_cells(rewards, cells, (1, 2))).any()


@given(
    batch=batches(),
    aggregation=st.sampled_from(["token", "sequence"]),
    cell_weights=st.sampled_from(["tokens", "equal"]),
)
def test_the_weights_of_all_tokens_sum_to_one(
    batch: Batch, aggregation: Aggregation, cell_weights: CellWeights
) -> None:
    _, lengths, cells = batch
    weights = token_weights(lengths, cells, aggregation=aggregation, cell_weights=cell_weights, emphasis={})
    assert (weights * lengths).sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("aggregation", "cell_weights", "expected"),
    [
        ("token", "tokens", [1 / 10, 1 / 10, 1 / 10]),
        ("sequence", "tokens", [1 / 6, 1 / 9, 1 / 15]),
        ("token", "equal", [1 / 10, 1 / 10, 1 / 10]),
        ("sequence", "equal", [1 / 8, 1 / 12, 1 / 10]),
    ],
)
def test_weights_by_hand(aggregation: Aggregation, cell_weights: CellWeights, expected: list[float]) -> None:
    weights = token_weights(
        [2, 3, 5],
        ["a", "a", "b"],
        aggregation=aggregation,
        cell_weights=cell_weights,
        emphasis={},
    )
    np.testing.assert_allclose(weights, expected)


@given(batch=batches())
def test_equal_cells_share_the_loss_equally(batch: Batch) -> None:
    _, lengths, cells = batch
    weights = token_weights(lengths, cells, aggregation="token", cell_weights="equal", emphasis={})
    names = np.array(cells)
    shares = [(weights * lengths)[names == cell].sum() for cell in set(cells)]
    np.testing.assert_allclose(shares, 1 / len(set(cells)))


def test_emphasis_scales_a_cell_and_leaves_the_others_alone() -> None:
    plain = token_weights([2, 3], ["a", "b"], aggregation="token", cell_weights="tokens", emphasis={})
    scaled = token_weights([2, 3], ["a", "b"], aggregation="token", cell_weights="tokens", emphasis={"a": 0.3})
    np.testing.assert_allclose(scaled, plain * [0.3, 1.0])
