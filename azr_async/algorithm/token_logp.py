"""Log-probabilities and entropies of chosen tokens, without ever holding the logits of all of them.

With 152 thousand words in the vocabulary, the logits of 16 thousand tokens are 10 GB in float32, and a plain loss keeps
three such tensors. Here they are computed a few tokens at a time, thrown away, and computed again for the gradient.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from azr_async.algorithm.losses import entropy


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """From a hidden state to logits: z = cap(scale * (W h + b)), cap(x) = c tanh(x / c), or x where c is 0."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] float32; the product itself is computed in the type of its factors."""
        logits_NV = functional.linear(hidden_NH, self.weight_VH, self.bias_V).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return self.cap * torch.tanh(logits_NV / self.cap) if self.cap else logits_NV


def chosen_logp(
    hidden_NH: Tensor,
    head: Head,
    target_N: Tensor,
    temperature_N: Tensor | None,
    *,
    with_entropy: bool = False,
    most_logits: int,
) -> tuple[Tensor, Tensor]:
    """log softmax(z / temperature)[target] of each token, and the entropy of that distribution.

    Args:
        hidden_NH: [N, H] what the model's body says; float32 or bfloat16, carries gradient, as does the head.
        target_N: [N] int64.
        temperature_N: [N] float32, above 0; None for 1, because dividing all logits takes a few percent of a step.
        with_entropy: or else zeros in its place.
        most_logits: logits held at a time. When all fit they are kept for the gradient, which saves computing them
            twice; otherwise the peak is about three such blocks of float32.

    Returns:
        [N] and [N] float32, nats; both carry gradient.
    """
    vocabulary = head.weight_VH.shape[0]
    if len(hidden_NH) * vocabulary <= most_logits:
        return logits_logp(head.logits(hidden_NH), target_N, temperature_N, with_entropy=with_entropy)
    if temperature_N is None:
        temperature_N = torch.ones(len(hidden_NH), device=hidden_NH.device)
    device_type = hidden_NH.device.type
    weight_VH, bias_V = head.weight_VH, head.bias_V
    if torch.is_autocast_enabled(device_type):
        # Once here, not once a block; autocast would do the same to the plain product.
        dtype = torch.get_autocast_dtype(device_type)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    blocks = -(-len(hidden_NH) * vocabulary // max(most_logits, vocabulary))
    block_tokens = -(-len(hidden_NH) // blocks)
    shape = (head.scale, head.cap, with_entropy, block_tokens)
    with torch.autocast(device_type, enabled=False):
        result: tuple[Tensor, Tensor] = _Blockwise.apply(  # type: ignore[no-untyped-call]
            hidden_NH, weight_VH, bias_V, target_N, temperature_N, shape
        )
    return result


def logits_logp(
    logits_NV: Tensor, target_N: Tensor, temperature_N: Tensor | None, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """The same from logits that are there already."""
    logits_NV = logits_NV.float() if temperature_N is None else logits_NV.float() / temperature_N[:, None]
    logp_N = -functional.cross_entropy(logits_NV, target_N, reduction="none")
    return logp_N, entropy(logits_NV) if with_entropy else torch.zeros_like(logp_N)


class _Context(Protocol):
    """What torch hands from forward to backward."""

    shape: tuple[float, float, bool, int]
    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Blockwise(torch.autograd.Function):
    """With p = softmax(z / T), y the target and H the entropy:

    d logp / d (z/T)_j = [j = y] - p_j        d H / d (z/T)_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(
        ctx: "_Context",
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        temperature_N: Tensor,
        shape: tuple[float, float, bool, int],
    ) -> tuple[Tensor, Tensor]:
        scale, cap, with_entropy, block_tokens = shape
        head = Head(weight_VH=weight_VH, bias_V=bias_V, scale=scale, cap=cap)
        logp_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        log_sum_N, entropy_N = torch.empty_like(logp_N), torch.zeros_like(logp_N)
        for block in _blocks(len(hidden_NH), block_tokens):
            logits_nV = head.logits(hidden_NH[block]).div_(temperature_N[block, None])
            log_sum_N[block] = logits_nV.logsumexp(-1)
            logp_N[block] = logits_nV.gather(-1, target_N[block, None])[:, 0] - log_sum_N[block]
            if with_entropy:
                # Not log_sum - sum p z: sum p is 1 but for rounding, and logits far from 0 would multiply that.
                log_share_nV = logits_nV.sub_(log_sum_N[block, None])
                entropy_N[block] = -_row_products(log_share_nV.exp(), log_share_nV)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, temperature_N, log_sum_N, entropy_N)
        ctx.shape = shape
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: "_Context", *grads_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, target_N, temperature_N, log_sum_N, entropy_N = ctx.saved_tensors
        scale, cap, with_entropy, block_tokens = ctx.shape
        head = Head(weight_VH=weight_VH, bias_V=bias_V, scale=scale, cap=cap)
        is_hidden, is_weight, is_bias, *_ = ctx.needs_input_grad
        grad_hidden_NH = torch.empty_like(hidden_NH) if is_hidden else None
        # Sums over blocks are kept in float32, whatever the type of the weights.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if is_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if is_bias else None
        for block in _blocks(len(hidden_NH), block_tokens):
            logits_nV = head.logits(hidden_NH[block])
            slope_nV = 1.0 - (logits_nV / cap).square_() if cap else None
            log_share_nV = logits_nV.div_(temperature_N[block, None]).sub_(log_sum_N[block, None])
            share_nV = log_share_nV.exp()
            grad_logp_n = grads_N[0][block, None]
            if with_entropy:
                grad_nV = log_share_nV.add_(entropy_N[block, None]).mul_(-grads_N[1][block, None]).sub_(grad_logp_n)
                grad_nV = grad_nV.mul_(share_nV)
            else:
                grad_nV = share_nV.mul_(-grad_logp_n)
            grad_nV.scatter_add_(-1, target_N[block, None], grad_logp_n)
            grad_nV.mul_(scale / temperature_N[block, None])
            if slope_nV is not None:
                grad_nV.mul_(slope_nV)
            if grad_bias_V is not None:
                grad_bias_V.add_(grad_nV.sum(0))
            grad_nV = grad_nV.to(hidden_NH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[block] = grad_nV @ weight_VH
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_nV, hidden_NH[block])
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None, None, None),
        )


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _row_products(one_nV: Tensor, other_nV: Tensor) -> Tensor:
    """[n] the sum of one * other over each row, without a third block."""
    return torch.bmm(one_nV[:, None, :], other_nV[:, :, None])[:, 0, 0]


def _add_product(total_VH: Tensor, grad_nV: Tensor, hidden_nH: Tensor) -> None:
    if grad_nV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_nV.T, hidden_nH)
    else:
        total_VH.add_(grad_nV.T @ hidden_nH)
