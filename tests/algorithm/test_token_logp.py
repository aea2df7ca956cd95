"""Block by block, the log-probabilities, entropies and gradients are those of the plain computation."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from azr_async.algorithm.token_logp import Head, chosen_logp

EVERYTHING = 2**40
"""Logits that always fit: the plain computation."""


class Inputs:
    """A random head and the hidden states before it."""

    def __init__(self, seed: int, tokens: int, vocabulary: int, *, has_bias: bool = False, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        self.hidden_NH, self.weight_VH = random(tokens, 6), random(vocabulary, 6)
        self.bias_V = random(vocabulary) if has_bias else None
        self.target_N = torch.randint(vocabulary, (tokens,), generator=generator)
        self.temperature_N = torch.rand(tokens, generator=generator) + 0.5
        self.weights_2N = torch.randn(2, tokens, generator=generator)

    def results(self, most_logits: int, *, with_entropy: bool, scale: float, cap: float) -> list[Tensor]:
        """Both outputs, then the gradients of a weighted sum of them."""
        leaves = [leaf for leaf in (self.hidden_NH, self.weight_VH, self.bias_V) if leaf is not None]
        head = Head(weight_VH=self.weight_VH, bias_V=self.bias_V, scale=scale, cap=cap)
        outputs = chosen_logp(
            self.hidden_NH, head, self.target_N, self.temperature_N, with_entropy=with_entropy, most_logits=most_logits
        )
        loss = (torch.stack(outputs) * self.weights_2N).sum()
        return [*outputs, *torch.autograd.grad(loss, leaves)]


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 20),
    vocabulary=st.integers(1, 40),
    most_logits=st.integers(0, 200),
    has_bias=st.booleans(),
    with_entropy=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    cap=st.sampled_from([0.0, 2.0]),
)
@example(seed=18, tokens=18, vocabulary=36, most_logits=0, has_bias=True, with_entropy=True, scale=1.0, cap=0.0)
def test_blocks_equal_the_whole_with_their_gradients(
    seed: int,
    tokens: int,
    vocabulary: int,
    most_logits: int,
    has_bias: bool,
    with_entropy: bool,
    scale: float,
    cap: float,
) -> None:
    inputs = Inputs(seed, tokens, vocabulary, has_bias=has_bias, dtype=torch.float32)
    plain = inputs.results(EVERYTHING, with_entropy=with_entropy, scale=scale, cap=cap)
    in_blocks = inputs.results(most_logits, with_entropy=with_entropy, scale=scale, cap=cap)
    for one, other in zip(in_blocks, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_logits_far_from_zero_cost_the_entropy_no_digits() -> None:
    """Where H is computed from sum p z, 1 - sum p (about 1e-7) times the logits is lost."""
    inputs = Inputs(0, 20, 40, has_bias=True, dtype=torch.float32)
    near = inputs.results(0, with_entropy=True, scale=1.0, cap=0.0)[1]
    assert inputs.bias_V is not None
    with torch.no_grad():
        inputs.bias_V += 512.0
    far = inputs.results(0, with_entropy=True, scale=1.0, cap=0.0)[1]
    # The logits themselves are rounded to 2**-14 there: 3e-5 each, of either sign.
    torch.testing.assert_close(far, near, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_bfloat16_differs_by_its_own_rounding_only(with_entropy: bool) -> None:
    inputs = Inputs(0, 50, 300, dtype=torch.bfloat16)
    plain = inputs.results(EVERYTHING, with_entropy=with_entropy, scale=1.0, cap=0.0)
    in_blocks = inputs.results(1000, with_entropy=with_entropy, scale=1.0, cap=0.0)
    assert [tensor.dtype for tensor in in_blocks] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for one, other in zip(in_blocks, plain, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=5e-2)


def test_autocast_computes_blocks_in_the_type_in_which_it_computes_the_whole() -> None:
    inputs = Inputs(1, 30, 200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = inputs.results(EVERYTHING, with_entropy=True, scale=1.0, cap=0.0)
        in_blocks = inputs.results(1000, with_entropy=True, scale=1.0, cap=0.0)
    torch.testing.assert_close(in_blocks[0], plain[0], rtol=1e-6, atol=1e-6)
    assert in_blocks[3].dtype == torch.float32
    torch.testing.assert_close(in_blocks[3], plain[3], rtol=2e-2, atol=5e-2)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_tensor_is_larger_than_a_block() -> None:
    tokens, vocabulary = 500, 1000
    inputs = Inputs(0, tokens, vocabulary, dtype=torch.float32)
    with Largest() as seen:
        inputs.results(20 * vocabulary, with_entropy=True, scale=1.0, cap=5.0)
    assert seen.elements <= 20 * vocabulary


@pytest.mark.parametrize("most_logits", [EVERYTHING, 100])
def test_no_temperature_is_a_temperature_of_one(most_logits: int) -> None:
    inputs = Inputs(0, 20, 30, dtype=torch.float32)
    head = Head(weight_VH=inputs.weight_VH)
    given, left_out = (
        chosen_logp(inputs.hidden_NH, head, inputs.target_N, temperature_N, with_entropy=True, most_logits=most_logits)
        for temperature_N in (torch.ones(20), None)
    )
    assert all(torch.equal(one, other) for one, other in zip(given, left_out, strict=True))
