"""The warm start's training loop."""

import pytest
import torch

from azr_async.starter.tokenizer import build_tokenizer
from azr_async.starter.training import Phase, build_model, train

TOKENIZER = build_tokenizer()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(seed: int, steps: int = 2) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = build_model(TOKENIZER, seed=seed)
    losses = list(train(model, TOKENIZER, Phase("clean", steps, 4e-3, wrong_share=0.0), seed=seed))
    return dict(model.state_dict()), losses


def test_a_seed_reproduces_the_weights_and_another_gives_others() -> None:
    (first, _), (again, _), (other, _) = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_loss_falls_from_what_guessing_costs() -> None:
    _, losses = trained(0, steps=40)
    assert losses[0] == pytest.approx(torch.tensor(float(len(TOKENIZER))).log().item(), abs=1.0)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_phases_draw_different_conversations() -> None:
    model = build_model(TOKENIZER, seed=0)
    clean, noisy = (
        next(iter(train(model, TOKENIZER, Phase(name, 1, 0.0, wrong_share=0.0), seed=0))) for name in ("clean", "noisy")
    )
    assert clean != noisy
