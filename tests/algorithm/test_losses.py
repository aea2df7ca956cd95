"""Off-policy objectives against a reference written token by token, by hand, and through properties."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from azr_async.algorithm.losses import (
    MEASURES,
    Objective,
    ObjectiveName,
    ProximalName,
    TokenBatch,
    effective_sample_size,
    entropy,
    measures,
    proximal_logp,
    surrogate_loss,
)

NAMES = ("decoupled-ppo", "masked-is", "cispo", "none")
DEFAULT = Objective(name="decoupled-ppo", clip_low=0.2, clip_high=0.3, dual_clip=3.0, ratio_cap=2.0, ratio_floor=0.5)
SEEDS = st.integers(0, 2**31)


def random_batch(seed: int, shape: tuple[int, int] = (3, 7)) -> tuple[Tensor, TokenBatch]:
    """Log-probabilities under theta, and everything else; about a third of the tokens is padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    behavior = -2 + normal(1.0)
    proximal = behavior + normal(0.5)
    batch = TokenBatch(
        behavior_logp=behavior,
        proximal_logp=proximal,
        advantage=normal(1.0),
        weight=normal(1.0).abs(),
        is_trained=torch.rand(shape, generator=generator) > 0.33,
    )
    return proximal + normal(0.3), batch


def reference(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[float, int]:
    """The loss and the number of cut tokens in plain Python, one token after the other."""
    total, cut = 0.0, 0
    for index in np.argwhere(batch.is_trained.numpy()):
        theta, mu, prox, a, weight = (
            float(values[tuple(index)])
            for values in (logp, batch.behavior_logp, batch.proximal_logp, batch.advantage, batch.weight)
        )
        loss, is_cut = reference_token(theta, mu, prox, a, objective)
        total, cut = total + weight * loss, cut + is_cut
    return total, cut


def reference_token(theta: float, mu: float, prox: float, a: float, objective: Objective) -> tuple[float, bool]:
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.name == "none":
        return -a * theta, False
    if objective.name == "cispo":
        rho = math.exp(theta - mu)
        return -min(max(rho, low), high) * a * theta, not low <= rho <= high
    r, w = math.exp(theta - prox), math.exp(prox - mu)
    ppo = -a * r
    is_clipped = False
    if a > 0 and r > high:
        ppo, is_clipped = -a * high, True
    if a < 0 and r < low:
        ppo, is_clipped = -a * low, True
    if a < 0 and objective.dual_clip and ppo > -a * objective.dual_clip:
        ppo, is_clipped = -a * objective.dual_clip, True
    if objective.name == "masked-is":
        is_outside = not objective.ratio_floor <= w <= objective.ratio_cap
        return (0.0 if is_outside else w * ppo), is_clipped or is_outside
    return min(w, objective.ratio_cap) * ppo, is_clipped or w > objective.ratio_cap


def reference_slope(theta: float, mu: float, prox: float, a: float, objective: Objective) -> float:
    """d loss / d theta of one token, from the published gradients; 0 where a bound holds the loss still."""
    if objective.name == "none":
        return -a
    if objective.name == "cispo":
        return -min(max(math.exp(theta - mu), 1 - objective.clip_low), 1 + objective.clip_high) * a
    r, w = math.exp(theta - prox), math.exp(prox - mu)
    is_held = r > 1 + objective.clip_high if a > 0 else r < 1 - objective.clip_low
    is_held = is_held or bool(a < 0 and objective.dual_clip and r > objective.dual_clip)
    if objective.name == "masked-is":
        is_held = is_held or not objective.ratio_floor <= w <= objective.ratio_cap
    return 0.0 if is_held else -min(w, objective.ratio_cap) * a * r


def loss_and_gradient(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    leaf = logp.clone().requires_grad_()
    loss, _ = surrogate_loss(leaf, batch, objective)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def one_token(**changes: float) -> tuple[Tensor, TokenBatch]:
    """One trained token; theta, mu and prox are given as probabilities."""
    values = {"theta": 0.5, "mu": 0.5, "prox": 0.5, "advantage": 1.0} | changes
    batch = TokenBatch(
        behavior_logp=torch.tensor([values["mu"]]).log(),
        proximal_logp=torch.tensor([values["prox"]]).log(),
        advantage=torch.tensor([values["advantage"]]),
        weight=torch.ones(1),
        is_trained=torch.ones(1, dtype=torch.bool),
    )
    return torch.tensor([values["theta"]]).log(), batch


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, dual_clip=st.sampled_from([0.0, 1.1, 3.0]))
def test_every_objective_equals_its_reference(name: ObjectiveName, seed: int, dual_clip: float) -> None:
    logp, batch = random_batch(seed)
    objective = replace(DEFAULT, name=name, dual_clip=dual_clip)
    loss, is_cut = surrogate_loss(logp, batch, objective)
    expected, expected_cut = reference(logp, batch, objective)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert int(is_cut.sum()) == expected_cut


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, dual_clip=st.sampled_from([0.0, 1.1, 3.0]))
def test_every_gradient_equals_its_reference(name: ObjectiveName, seed: int, dual_clip: float) -> None:
    logp, batch = random_batch(seed)
    objective = replace(DEFAULT, name=name, dual_clip=dual_clip)
    _, gradient = loss_and_gradient(logp, batch, objective)
    columns = (logp, batch.behavior_logp, batch.proximal_logp, batch.advantage)
    tokens = zip(*(values.flatten().tolist() for values in columns), strict=True)
    slopes = torch.tensor([reference_slope(*token, objective) for token in tokens], dtype=torch.float64)
    expected = torch.where(batch.is_trained, batch.weight * slopes.view(logp.shape), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_in_float32_as_in_training_every_objective_equals_its_reference_to_1e_6(name: ObjectiveName, seed: int) -> None:
    logp, batch = random_batch(seed)
    columns = (batch.behavior_logp, batch.proximal_logp, batch.advantage, batch.weight / batch.weight.sum())
    behavior, proximal, advantage, weight = (values.float() for values in columns)
    narrow = TokenBatch(
        behavior_logp=behavior, proximal_logp=proximal, advantage=advantage, weight=weight, is_trained=batch.is_trained
    )
    objective = replace(DEFAULT, name=name)
    loss, _ = surrogate_loss(logp.float(), narrow, objective)
    expected, _ = reference(logp.float(), narrow, objective)  # in double precision, from what float32 holds
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, junk=st.sampled_from([0.0, 1e30, math.inf, -math.inf, math.nan]))
def test_padding_changes_neither_the_loss_nor_its_gradient(name: ObjectiveName, seed: int, junk: float) -> None:
    logp, batch = random_batch(seed)
    objective = replace(DEFAULT, name=name)
    filled = [
        torch.where(batch.is_trained, values, junk)
        for values in (logp, batch.behavior_logp, batch.proximal_logp, batch.advantage, batch.weight)
    ]
    dirty = TokenBatch(
        behavior_logp=filled[1],
        proximal_logp=filled[2],
        advantage=filled[3],
        weight=filled[4],
        is_trained=batch.is_trained,
    )
    torch.testing.assert_close(
        loss_and_gradient(filled[0], dirty, objective), loss_and_gradient(logp, batch, objective), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_micro_batches_add_up_to_the_batch(name: ObjectiveName, seed: int) -> None:
    logp, batch = random_batch(seed)
    objective = replace(DEFAULT, name=name)
    whole, _ = surrogate_loss(logp, batch, objective)
    rows = [
        surrogate_loss(
            logp[row],
            TokenBatch(
                behavior_logp=batch.behavior_logp[row],
                proximal_logp=batch.proximal_logp[row],
                advantage=batch.advantage[row],
                weight=batch.weight[row],
                is_trained=batch.is_trained[row],
            ),
            objective,
        )[0]
        for row in range(len(logp))
    ]
    torch.testing.assert_close(torch.stack(rows).sum(), whole)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_on_policy_every_objective_has_the_gradient_of_reinforce(name: ObjectiveName, seed: int) -> None:
    logp, batch = random_batch(seed)
    fresh = replace(batch, behavior_logp=logp, proximal_logp=logp)
    _, gradient = loss_and_gradient(logp, fresh, replace(DEFAULT, name=name))
    expected = torch.where(batch.is_trained, -batch.weight * batch.advantage, 0.0)
    torch.testing.assert_close(gradient, expected)


@given(seed=SEEDS)
def test_within_its_bounds_decoupled_ppo_does_not_depend_on_the_proximal_policy(seed: int) -> None:
    logp, batch = random_batch(seed)
    near = replace(batch, behavior_logp=logp - 0.05, proximal_logp=logp - 0.02)
    middle = replace(near, proximal_logp=logp - 0.04)
    torch.testing.assert_close(loss_and_gradient(logp, near, DEFAULT), loss_and_gradient(logp, middle, DEFAULT))


@given(seed=SEEDS)
def test_with_the_learner_itself_as_proximal_policy_it_is_truncated_importance_sampling(seed: int) -> None:
    """Espeholt et al. 2018, arXiv:1802.01561, section 4.2: min(rho, pi / mu) * A * grad log pi."""
    logp, batch = random_batch(seed)
    _, gradient = loss_and_gradient(logp, replace(batch, proximal_logp=logp), DEFAULT)
    rho = (logp - batch.behavior_logp).exp().clamp(max=DEFAULT.ratio_cap)
    expected = torch.where(batch.is_trained, -batch.weight * rho * batch.advantage, 0.0)
    torch.testing.assert_close(gradient, expected)


@given(seed=SEEDS)
def test_without_bounds_of_its_own_decoupled_ppo_with_mu_as_proximal_policy_is_ppo(seed: int) -> None:
    """Schulman et al. 2017, arXiv:1707.06347, Eq. 7: mean of min(r A, clip(r, 1 - e, 1 + e) A), to be maximised."""
    logp, batch = random_batch(seed)
    plain = replace(DEFAULT, dual_clip=0.0, ratio_cap=math.inf)
    loss, _ = surrogate_loss(logp, replace(batch, proximal_logp=batch.behavior_logp), plain)
    expected = 0.0
    for index in np.argwhere(batch.is_trained.numpy()):
        place = tuple(index)
        a, ratio = float(batch.advantage[place]), math.exp(float(logp[place] - batch.behavior_logp[place]))
        clipped = min(max(ratio, 1 - plain.clip_low), 1 + plain.clip_high)
        expected -= float(batch.weight[place]) * min(ratio * a, clipped * a)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        # w = 0.5 / 0.4, r = 0.55 / 0.5: inside all bounds.
        ("decoupled-ppo", {"theta": 0.55, "mu": 0.4}, -(0.5 / 0.4) * 1.1),
        # w = 5 is truncated at 2.
        ("decoupled-ppo", {"mu": 0.1}, -2.0),
        # r = 1.8 is clipped at 1.3.
        ("decoupled-ppo", {"theta": 0.9}, -1.3),
        # A bad token that became likelier: the plain ratio counts, and the dual clip bounds it.
        ("decoupled-ppo", {"theta": 0.9, "advantage": -1.0}, 1.8),
        ("decoupled-ppo", {"theta": 0.9, "prox": 0.1, "mu": 0.1, "advantage": -1.0}, 3.0),
        # A bad token that became rarer: clipped at 0.8.
        ("decoupled-ppo", {"theta": 0.1, "advantage": -2.0}, 1.6),
        ("masked-is", {"mu": 0.4}, -0.5 / 0.4),
        ("masked-is", {"mu": 0.2}, 0.0),
        ("masked-is", {"prox": 0.2, "theta": 0.2}, 0.0),
        ("cispo", {"mu": 0.25}, -1.3 * math.log(0.5)),
        ("cispo", {"mu": 0.45}, -(0.5 / 0.45) * math.log(0.5)),
        ("none", {"mu": 0.01, "advantage": 0.5}, -0.5 * math.log(0.5)),
    ],
)
def test_one_token_by_hand(name: ObjectiveName, token: dict[str, float], expected: float) -> None:
    logp, batch = one_token(**token)
    loss, _ = surrogate_loss(logp, batch, replace(DEFAULT, name=name))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_truncated_weight_carries_no_gradient() -> None:
    logp, batch = one_token(mu=0.1)
    batch.proximal_logp.requires_grad_()
    leaf = logp.clone().requires_grad_()
    surrogate_loss(leaf, batch, DEFAULT)[0].backward()
    assert batch.proximal_logp.grad is None
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(-2.0)


@given(seed=SEEDS)
def test_the_gradient_of_a_bad_token_is_bounded(seed: int) -> None:
    logp, batch = random_batch(seed)
    wild = replace(batch, advantage=-batch.advantage.abs())
    _, gradient = loss_and_gradient(logp + 8.0, wild, DEFAULT)
    bound = DEFAULT.ratio_cap * DEFAULT.dual_clip * wild.weight * wild.advantage.abs()
    assert (gradient.abs() <= bound + 1e-9).all()


def test_nothing_trained_gives_zero() -> None:
    logp, batch = random_batch(0)
    nothing = replace(batch, is_trained=torch.zeros_like(batch.is_trained))
    loss, gradient = loss_and_gradient(logp, nothing, DEFAULT)
    assert loss == 0.0
    assert (gradient == 0.0).all()


def test_the_proximal_policy_by_name() -> None:
    logp, behavior = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-3.0, -3.0, -3.0])
    versions = torch.tensor([7, 6, 3])
    assert proximal_logp("detached", logp=logp, behavior_logp=behavior).tolist() == logp.tolist()
    again = proximal_logp("recomputed", logp=logp, behavior_logp=behavior, recomputed_logp=logp + 1)
    assert again.tolist() == [0.0, 0.0, 0.0]
    between = proximal_logp("interpolated", logp=logp, behavior_logp=behavior, version=7, token_version=versions)
    assert between.tolist() == [-3.0, -3.0, -1.5]  # a = 0 when fresh, 0 after one step, 3/4 after four


@given(seed=SEEDS, version=st.integers(0, 9), lag=st.integers(0, 9))
def test_the_interpolated_policy_equals_its_formula(seed: int, version: int, lag: int) -> None:
    """Li et al. 2025 (A-3PO), arXiv:2512.06547: log prox = a log theta + (1 - a) log mu, a = 1 - 1 / lag."""
    logp, batch = random_batch(seed)
    versions = torch.full(logp.shape, version - min(lag, version))
    between = proximal_logp(
        "interpolated", logp=logp, behavior_logp=batch.behavior_logp, version=version, token_version=versions
    )
    a = 1 - 1 / max(min(lag, version), 1)
    torch.testing.assert_close(between, a * logp + (1 - a) * batch.behavior_logp)


@pytest.mark.parametrize("name", ["recomputed", "interpolated"])
def test_a_proximal_policy_without_its_input_is_refused(name: ProximalName) -> None:
    with pytest.raises(ValueError, match="needs"):
        proximal_logp(name, logp=torch.zeros(1), behavior_logp=torch.zeros(1))


@given(seed=SEEDS, name=st.sampled_from(["detached", "recomputed", "interpolated"]))
def test_no_proximal_policy_carries_a_gradient(seed: int, name: ProximalName) -> None:
    logp, batch = random_batch(seed)
    logp.requires_grad_()
    versions = torch.zeros_like(logp, dtype=torch.int32)
    proximal = proximal_logp(
        name, logp=logp, behavior_logp=batch.behavior_logp, recomputed_logp=logp, version=5, token_version=versions
    )
    assert not proximal.requires_grad


def test_measures_by_hand() -> None:
    logp, behavior = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.4, 0.4]).log()
    sums, largest = measures(logp, behavior, torch.tensor([True, False]), torch.ones(2, dtype=torch.bool))
    named = dict(zip(MEASURES, sums.tolist(), strict=True))
    assert named == pytest.approx(
        {"tokens": 2, "cut": 1, "weight": 2.5, "weight_squared": 4.25, "kl_k1": 0.0, "kl_k3": 0.5}, abs=1e-6
    )
    assert largest.item() == pytest.approx(2.0)
    assert effective_sample_size(2, 2.5, 4.25) == pytest.approx(6.25 / 8.5)


def test_no_tokens_give_neutral_measures() -> None:
    nothing = torch.zeros(0)
    sums, largest = measures(nothing, nothing, nothing.bool(), nothing.bool())
    assert sums.tolist() == [0.0] * len(MEASURES)
    assert largest.item() == 0.0
    assert effective_sample_size(0, 0, 0) == 1.0


@given(seed=SEEDS, junk=st.sampled_from([1e30, math.inf, -math.inf, math.nan]))
def test_padding_does_not_enter_the_measures(seed: int, junk: float) -> None:
    logp, batch = random_batch(seed)
    trained = batch.is_trained
    clean = measures(logp[trained], batch.behavior_logp[trained], trained[trained], trained[trained])
    dirty = measures(torch.where(trained, logp, junk), batch.behavior_logp, trained, trained)
    torch.testing.assert_close(dirty, clean)


@given(seed=SEEDS)
def test_the_effective_sample_size_is_a_share_and_whole_on_policy(seed: int) -> None:
    logp, batch = random_batch(seed)
    named = dict(zip(MEASURES, measures(logp, batch.behavior_logp, batch.is_trained, batch.is_trained)[0], strict=True))
    ess = effective_sample_size(named["tokens"], named["weight"], named["weight_squared"])
    assert 0.0 < ess <= 1.0 + 1e-9
    assert named["kl_k3"] >= 0.0
    fresh = dict(zip(MEASURES, measures(logp, logp, batch.is_trained, batch.is_trained)[0], strict=True))
    assert effective_sample_size(fresh["tokens"], fresh["weight"], fresh["weight_squared"]) == pytest.approx(1.0)


def test_k1_and_k3_estimate_the_divergence() -> None:
    behavior, theta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (behavior * (behavior / theta).log()).sum().item()
    draws = torch.multinomial(behavior, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    every = torch.ones_like(draws, dtype=torch.bool)
    sums, _ = measures(theta.log()[draws], behavior.log()[draws], every, every)
    named = dict(zip(MEASURES, (sums / len(draws)).tolist(), strict=True))
    assert named["kl_k1"] == pytest.approx(exact, abs=2e-3)
    assert named["kl_k3"] == pytest.approx(exact, abs=2e-4)


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), 0.0]))


@given(seed=SEEDS)
def test_entropy_equals_its_definition_with_its_gradient(seed: int) -> None:
    logits = (
        3 * torch.randn(5, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).requires_grad_()
    share = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = -(share * share.log()).sum(-1)
    torch.testing.assert_close(entropy(logits), expected)
    slopes = [torch.autograd.grad(value.sum(), logits)[0] for value in (entropy(logits), expected)]
    torch.testing.assert_close(*slopes)


@given(seed=SEEDS)
def test_entropy_lies_between_nothing_and_uniform(seed: int) -> None:
    logits = 10 * torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    assert (entropy(logits) >= -1e-6).all()
    assert (entropy(logits) <= math.log(9) + 1e-5).all()
