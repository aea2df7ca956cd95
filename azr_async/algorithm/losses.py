"""Off-policy objectives, token by token, and what they tell about how far off the data is.

Three policies meet at each token: mu sampled it (its log-probability came with the token), the proximal policy is
the learner at the start of the update, theta is in training. All functions here take any shape, in nats.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

ObjectiveName = Literal["decoupled-ppo", "masked-is", "cispo", "none"]
ProximalName = Literal["detached", "recomputed", "interpolated"]

MEASURES: Final = ("tokens", "cut", "weight", "weight_squared", "kl_k1", "kl_k3")
"""What `measures` sums up, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Which loss, and its bounds; all dimensionless."""

    name: ObjectiveName
    clip_low: float
    """The trust region ends at 1 - clip_low."""
    clip_high: float
    """... and at 1 + clip_high."""
    dual_clip: float
    """Largest loss of a bad sample, as a multiple of -advantage; 0 for no bound."""
    ratio_cap: float
    """C: the behaviour weight is truncated (decoupled-ppo) or the token masked (masked-is) above."""
    ratio_floor: float
    """masked-is masks the token below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """What is known of each token before the update; every field has the shape of the log-probabilities."""

    behavior_logp: Tensor
    """Under mu, as recorded by the engine."""
    proximal_logp: Tensor
    """Under the proximal policy."""
    advantage: Tensor
    weight: Tensor
    """Share of the token in the loss: 1 / count for a mean; the caller's counts are those of the whole batch."""
    is_trained: Tensor
    """bool; where it is False the other fields may hold anything, NaN included."""


def surrogate_loss(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """The loss to be minimised: sum over the trained tokens of weight * token loss.

    A plain sum, so that micro-batches and ranks add up exactly.

    Args:
        logp: float32, under theta; carries the gradient.

    Returns:
        [] the loss; and bool, in the shape of logp: was the token's weight or ratio cut by one of the bounds?
    """
    # Mask before exp: one infinity in the padding would turn the whole gradient into NaN.
    kept = TokenBatch(
        behavior_logp=_only(batch.is_trained, batch.behavior_logp),
        proximal_logp=_only(batch.is_trained, batch.proximal_logp).detach(),
        advantage=_only(batch.is_trained, batch.advantage),
        weight=_only(batch.is_trained, batch.weight),
        is_trained=batch.is_trained,
    )
    token_loss, is_cut = _OBJECTIVES[objective.name](_only(batch.is_trained, logp), kept, objective)
    return (kept.weight * token_loss).sum(), is_cut & batch.is_trained


def proximal_logp(
    name: ProximalName,
    *,
    logp: Tensor,
    behavior_logp: Tensor,
    recomputed_logp: Tensor | None = None,
    version: int = 0,
    token_version: Tensor | None = None,
) -> Tensor:
    """Log-probabilities under the proximal policy; carries no gradient.

    * detached: theta itself. Exact when a batch is one update, for then theta still is the learner at its start.
    * recomputed: the caller's forward pass at the start of the update.
    * interpolated: log mu + a (log theta - log mu), a = 1 - 1 / (version - token_version), and 0 for fresh tokens.
      Li et al. 2025 (A-3PO), arXiv:2512.06547.

    Raises:
        ValueError: the input that `name` needs is missing.
    """
    if name == "detached":
        return logp.detach()
    if name == "recomputed":
        if recomputed_logp is None:
            raise ValueError("a recomputed proximal policy needs recomputed_logp")
        return recomputed_logp.detach()
    if token_version is None:
        raise ValueError("an interpolated proximal policy needs token_version")
    share = 1.0 - 1.0 / (version - token_version).clamp(min=1)
    return behavior_logp + share * (logp.detach() - behavior_logp)


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v of each row, nats, in [0, log V].

    Args:
        logits: [..., V] not normalised.

    Returns:
        [...] carries the gradient.
    """
    log_probability = logits.log_softmax(-1)
    return -(log_probability.exp() * log_probability).sum(-1)


def measures(logp: Tensor, behavior_logp: Tensor, is_cut: Tensor, is_trained: Tensor) -> tuple[Tensor, Tensor]:
    """Sums for `effective_sample_size` and its neighbours; add them over micro-batches and ranks.

    The importance weight here is w = theta / mu, never truncated: a truncated weight hides the mismatch.
    KL(mu || theta) per token, from samples of mu: k1 = -log w, and k3 = w - 1 - log w, which is never negative and
    varies less (Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html).

    Returns:
        [6] float64, in the order of MEASURES; and [] float64, the largest weight (0 when nothing is trained).
    """
    log_weight = _only(is_trained, logp.detach().double() - behavior_logp.double())
    weight = _only(is_trained, log_weight.exp())
    k3 = _only(is_trained, weight - 1.0 - log_weight)
    columns = (is_trained, is_cut, weight, weight.square(), -log_weight, k3)
    largest = weight.max() if weight.numel() else weight.new_zeros(())
    return torch.stack([column.double().sum() for column in columns]), largest


def effective_sample_size(tokens: float, weight: float, weight_squared: float) -> float:
    """Kish's share of the data that counts: (sum w)^2 / (n sum w^2), in (0, 1]; 1 on policy, and when n is 0."""
    return weight * weight / (tokens * weight_squared) if tokens and weight_squared else 1.0


def _decoupled_ppo(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """min(w, C) * PPO(r, A),   w = prox / mu without gradient,   r = theta / prox.

    Hilton et al. 2021, arXiv:2110.00641; Fu et al. 2025 (AReaL), arXiv:2505.24298, section 5.2. The truncation at C
    is that of IMPALA's V-trace (Espeholt et al. 2018, arXiv:1802.01561).
    """
    behavior_weight = (batch.proximal_logp - batch.behavior_logp).exp()
    loss, is_clipped = _ppo(logp, batch, objective)
    return behavior_weight.clamp(max=objective.ratio_cap) * loss, is_clipped | (behavior_weight > objective.ratio_cap)


def _masked_is(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """w * 1[floor <= w <= cap] * PPO(r, A): a token that the engines disagree about is left out, not toned down.

    Ling Team 2025 (Ring-1T, "IcePop"), arXiv:2510.18855. The token still counts in the normaliser.
    """
    behavior_weight = (batch.proximal_logp - batch.behavior_logp).exp()
    is_inside = (behavior_weight >= objective.ratio_floor) & (behavior_weight <= objective.ratio_cap)
    loss, is_clipped = _ppo(logp, batch, objective)
    return _only(is_inside, behavior_weight) * loss, is_clipped | ~is_inside


def _cispo(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """-clip(rho, 1 - clip_low, 1 + clip_high) * A * log theta,   rho = theta / mu without gradient.

    MiniMax 2025 (MiniMax-M1), arXiv:2506.13585, section 3.1: every token keeps its gradient, the weight is bounded.
    """
    ratio = (logp.detach() - batch.behavior_logp).exp()
    clipped = ratio.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    return -clipped * batch.advantage * logp, clipped != ratio


def _reinforce(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """-A * log theta. Williams 1992; right on policy only."""
    return -batch.advantage * logp, torch.zeros_like(batch.is_trained)


def _ppo(logp: Tensor, batch: TokenBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and at most -A * dual_clip where A < 0.

    Schulman et al. 2017, arXiv:1707.06347, Eq. 7. Unequal bounds: Yu et al. 2025 (DAPO), arXiv:2503.14476. The
    second bound: Ye et al. 2020 (dual clip), arXiv:1912.09729; without it the loss of a bad sample has none.
    """
    ratio = (logp - batch.proximal_logp).exp()
    clipped = ratio.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
    plain, bounded = -batch.advantage * ratio, -batch.advantage * clipped
    loss, is_clipped = torch.maximum(plain, bounded), bounded > plain
    if objective.dual_clip:
        ceiling = torch.where(batch.advantage < 0, -batch.advantage * objective.dual_clip, torch.inf)
        is_clipped = is_clipped | (loss > ceiling)
        loss = torch.minimum(loss, ceiling)
    return loss, is_clipped


def _only(chosen: Tensor, values: Tensor) -> Tensor:
    return torch.where(chosen, values, 0.0)


_OBJECTIVES: Final = {
    "decoupled-ppo": _decoupled_ppo,
    "masked-is": _masked_is,
    "cispo": _cispo,
    "none": _reinforce,
}
