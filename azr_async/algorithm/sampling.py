"""How a token is drawn: the distribution sampled from, and randomness that no other sequence can disturb.

Every draw is a pure function of (job seed, sample index, token position). So a sequence gets the same tokens alone and
in a crowd, before and after rows are moved, and when a job is generated a second time.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_UNIT: Final = 2.0**-53


def stream_keys(seed: int, indices_B: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit key per sequence: [B] sample indices of a job with this seed -> [B] keys."""
    seeds_B = np.full(len(indices_B), seed % 2**64, np.uint64)
    return _mixed(_mixed(seeds_B + _GOLDEN) ^ ((indices_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN))


def uniforms(keys_B: NDArray[np.uint64], positions_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """The number in [0, 1) that decides the token at each position: 53 bits of a counter-based generator.

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), entered at any point.
    """
    counters_B = keys_B + (positions_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mixed(counters_B) >> np.uint64(11)).astype(np.float64) * _UNIT


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sampled_logp(logits_BV: Tensor, temperature_B: Tensor | None, top_p_B: Tensor | None) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from: after temperature, then nucleus.

    Args:
        logits_BV: [B, V] in any float type.
        temperature_B: [B]; 0 is greedy, a distribution with all its mass on the largest logit. None is 1 in every row.
        top_p_B: [B] in (0, 1]; None is 1 in every row.

    Returns:
        [B, V] float32, nats; minus infinity for a token that cannot be drawn.
    """
    logits_BV = logits_BV.float()
    if temperature_B is None:
        logp_BV = torch.log_softmax(logits_BV, -1)
    else:
        is_greedy_B1 = (temperature_B == 0)[:, None]
        logp_BV = torch.log_softmax(logits_BV / torch.where(is_greedy_B1, 1.0, temperature_B[:, None].float()), -1)
    if top_p_B is not None:
        logp_BV = _nucleus(logp_BV, top_p_B)
    if temperature_B is None:
        return logp_BV
    point_BV = torch.full_like(logits_BV, -torch.inf).scatter_(1, logits_BV.argmax(-1, keepdim=True), 0.0)
    return torch.where(is_greedy_B1, point_BV, logp_BV)


def _nucleus(logp_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Keep the most likely tokens until their mass reaches top_p, renormalised (Holtzman et al., arXiv:1904.09751)."""
    sorted_logp_BV, order_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_logp_BV.double().exp()
    # A token stays when the more likely ones leave mass to fill; so the first always stays.
    is_kept_BV = mass_BV.cumsum(-1) - mass_BV < top_p_B[:, None]
    is_kept_BV = is_kept_BV | (top_p_B >= 1.0)[:, None]
    kept_BV = torch.where(is_kept_BV, sorted_logp_BV, -torch.inf)
    return torch.empty_like(logp_BV).scatter_(1, order_BV, torch.log_softmax(kept_BV, -1))


def drawn(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens by inverse cumulative distribution: [B, V] float32 and [B] float64 in [0, 1) -> [B] int64.

    A token of probability zero is never drawn, whatever the rounding.
    """
    cumulative_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    below_total_B = torch.nextafter(total_B, torch.zeros_like(total_B))
    target_B = torch.minimum(uniform_B * total_B, below_total_B)
    token_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    # Only a distribution that is not finite can lead out of the vocabulary; the caller sees that in its logp.
    return token_B.clamp_(max=logp_BV.shape[-1] - 1)
