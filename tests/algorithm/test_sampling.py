"""Draws are counter-based, fit the distribution, and never leave it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from torch.testing import assert_close

from azr_async.algorithm.sampling import drawn, sampled_logp, stream_keys, uniforms

seeds = some.integers(-(2**70), 2**70)
logits = arrays.arrays(
    np.float32,
    some.tuples(some.integers(1, 6), some.integers(1, 20)),
    elements=some.floats(-50, 50, width=32),
)


@given(seed=seeds, samples=some.integers(1, 50), position=some.integers(0, 10_000))
def test_a_draw_depends_on_nothing_but_seed_sample_and_position(seed: int, samples: int, position: int) -> None:
    crowd_keys = stream_keys(seed, np.arange(samples))
    crowd = uniforms(crowd_keys, np.full(samples, position))
    alone = uniforms(stream_keys(seed, np.array([samples - 1])), np.array([position]))
    assert alone[0] == crowd[-1]


@given(seed=seeds)
def test_uniforms_are_in_the_unit_interval_and_spread_evenly(seed: int) -> None:
    keys = np.repeat(stream_keys(seed, np.arange(64)), 64)
    values = uniforms(keys, np.tile(np.arange(64), 64))
    counts = np.bincount((values * 16).astype(int), minlength=16)
    assert values.min() >= 0
    assert values.max() < 1
    # 15 degrees of freedom: 60 is exceeded once in 4 million honest trials.
    assert ((counts - 256) ** 2 / 256).sum() < 60


def test_neighbouring_streams_and_positions_are_uncorrelated() -> None:
    keys = np.concatenate([stream_keys(seed, np.arange(100)) for seed in range(10)])
    table = np.stack([uniforms(keys, np.full(1000, position)) for position in range(100)])
    by_position = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    by_stream = np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]
    assert len(np.unique(table)) == table.size
    assert abs(by_position) < 0.02
    assert abs(by_stream) < 0.02


@given(logits_BV=logits, temperature=some.floats(0.1, 5), top_p=some.floats(0.01, 1))
def test_the_distribution_is_whole(logits_BV: np.ndarray, temperature: float, top_p: float) -> None:
    rows = len(logits_BV)
    logp_BV = sampled_logp(
        torch.from_numpy(logits_BV), torch.full((rows,), temperature), torch.full((rows,), top_p, dtype=torch.float32)
    )
    assert_close(logp_BV.exp().sum(-1), torch.ones(rows))


@given(logits_BV=logits)
def test_neutral_settings_are_the_model_itself(logits_BV: np.ndarray) -> None:
    ones = torch.ones(len(logits_BV))
    expected = torch.log_softmax(torch.from_numpy(logits_BV), -1)
    assert_close(sampled_logp(torch.from_numpy(logits_BV), None, None), expected)
    assert_close(sampled_logp(torch.from_numpy(logits_BV), ones, ones), expected)


@given(logits_BV=logits, uniform=some.floats(0, 1, exclude_max=True))
def test_greedy_takes_the_largest_logit_with_certainty(logits_BV: np.ndarray, uniform: float) -> None:
    rows = len(logits_BV)
    logp_BV = sampled_logp(torch.from_numpy(logits_BV), torch.zeros(rows), None)
    token_B = drawn(logp_BV, torch.full((rows,), uniform, dtype=torch.float64))
    assert token_B.tolist() == logits_BV.argmax(-1).tolist()
    assert logp_BV.gather(1, token_B[:, None]).tolist() == [[0.0]] * rows


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits_BV = torch.randn(4, 9)
    mixed_BV = sampled_logp(logits_BV, torch.tensor([0.0, 1.0, 0.5, 0.0]), None)
    assert_close(mixed_BV[1:2], sampled_logp(logits_BV[1:2], None, None))
    assert_close(mixed_BV[2], torch.log_softmax(logits_BV[2] / 0.5, -1))
    assert (mixed_BV[[0, 3]] == 0).sum() == 2


def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass() -> None:
    logits_BV = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    chances = sampled_logp(logits_BV, None, torch.tensor([0.7])).exp()
    assert_close(chances, torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0]]))


@given(logits_BV=logits, top_p=some.floats(0.01, 1), uniform=some.floats(0, 1, exclude_max=True))
def test_only_tokens_with_mass_are_drawn(logits_BV: np.ndarray, top_p: float, uniform: float) -> None:
    rows = len(logits_BV)
    logp_BV = sampled_logp(torch.from_numpy(logits_BV), None, torch.full((rows,), top_p, dtype=torch.float32))
    token_B = drawn(logp_BV, torch.full((rows,), uniform, dtype=torch.float64))
    assert torch.isfinite(logp_BV.gather(1, token_B[:, None])).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_stay_inside(uniform: float) -> None:
    logp_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert drawn(logp_BV, torch.tensor([uniform], dtype=torch.float64)).item() == 1


def test_frequencies_match_the_probabilities() -> None:
    logp_V = torch.log_softmax(torch.tensor([0.0, 1.0, -1.0, 2.0]), -1)
    uniform_B = uniforms(stream_keys(7, np.arange(20_000)), np.zeros(20_000, np.int64))
    token_B = drawn(logp_V.expand(20_000, 4), torch.from_numpy(uniform_B))
    assert_close(torch.bincount(token_B, minlength=4) / 20_000, logp_V.exp(), atol=0.01, rtol=0)
