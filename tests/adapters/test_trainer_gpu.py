"""What only a GPU can show: its attention kernel keeps packed sequences apart as the exact path on the CPU does."""

import pytest
import torch
from torch import Tensor

from azr_async.adapters.trainer.chunks import packed_chunk_of
from azr_async.adapters.trainer.policy import SAME_NATS, TokenPolicy, can_pack, find_head
from tests.adapters.test_trainer_layouts import mistral, random_samples
from tests.random_models import random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


MODELS = {
    "heads too odd for the kernel": lambda: random_model("qwen2-tied"),
    "all tokens": lambda: mistral(None),
    "a window": lambda: mistral(5),
}


def results(kind: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Log-probabilities of packed samples, and the gradient of their sum by every weight; float32, on the CPU."""
    model = MODELS[kind]()
    policy = TokenPolicy(model.to(device), logits_mb=1)
    samples = random_samples(0, [17, 3, 40, 9, 120])
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        find_head(policy, device, same_nats=SAME_NATS[dtype])
        assert can_pack(policy, device, same_nats=SAME_NATS[dtype])
        logp_N, _ = policy(packed_chunk_of(samples, device))
    logp_N.mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (logp_N, *gradients)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_computes_packed_sequences_and_their_gradients_as_the_cpu_does(kind: str, dtype: torch.dtype) -> None:
    expected = results(kind, torch.device("cpu"), torch.float32)
    measured = results(kind, torch.device("cuda"), dtype)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.15}[dtype]
    for ours, theirs in zip(measured, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * max(float(theirs.norm()), 1e-3)
