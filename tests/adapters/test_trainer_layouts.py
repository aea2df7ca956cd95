"""However sequences lie on the device, and whatever follows the output layer: the model's own log-probabilities."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.adapters.trainer.chunks import chunk_of, packed_chunk_of
from azr_async.adapters.trainer.policy import SAME_NATS, TokenPolicy, can_pack, can_share, find_head
from azr_async.adapters.trainer.samples import Sample, unrewarded
from azr_async.config import Config
from azr_async.messages import RolloutBatch
from tests.random_models import VOCABULARY, random_model
from tests.rollout_batches import random_batch

CPU = torch.device("cpu")
CLOSE = SAME_NATS[torch.float32]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def mistral(window: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)).eval()


def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()


def policy_of(model: nn.Module) -> TokenPolicy:
    policy = TokenPolicy(model, logits_mb=256)
    find_head(policy, CPU, same_nats=CLOSE)
    return policy


def random_samples(seed: int, lengths: list[int]) -> list[Sample]:
    generator = np.random.default_rng(seed)
    return [
        unrewarded(
            generator.integers(0, VOCABULARY, length, dtype=np.int32), prompt_length=int(generator.integers(1, length))
        )
        for length in lengths
    ]


def own_logp(model: nn.Module, samples: list[Sample]) -> Tensor:
    """What the model itself says about the completions, each in a call of its own."""
    parts = []
    for sample in samples:
        ids_T = torch.from_numpy(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            logp_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logp_TV.gather(-1, ids_T[1:, None])[sample.prompt_length - 1 :, 0])
    return torch.cat(parts)


# ---------------------------------------------------------------- packed without cross-talk


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6))
@pytest.mark.parametrize(
    "model",
    [random_model("qwen2-tied"), random_model("llama-untied"), mistral(5)],
    ids=["qwen2-tied", "llama-untied", "mistral with a window"],
)
def test_packed_sequences_read_as_if_each_were_alone(model: PreTrainedModel, seed: int, lengths: list[int]) -> None:
    samples = random_samples(seed, lengths)
    policy = policy_of(model)
    expected_N = own_logp(model, samples)
    assert can_pack(policy, CPU, same_nats=CLOSE)
    torch.testing.assert_close(policy(packed_chunk_of(samples, CPU))[0], expected_N, rtol=1e-4, atol=1e-4)
    rows = [[sample] for sample in samples]
    torch.testing.assert_close(policy(chunk_of(rows, CPU))[0], expected_N, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(2, 20), min_size=2, max_size=6), changed=st.integers(0))
def test_a_sequence_never_feels_what_its_neighbours_are(seed: int, lengths: list[int], changed: int) -> None:
    samples = random_samples(seed, lengths)
    policy = policy_of(random_model("qwen2-tied"))
    assert can_pack(policy, CPU, same_nats=CLOSE)
    before_N, _ = policy(packed_chunk_of(samples, CPU))
    number = changed % len(samples)
    other = replace(samples[number], token_ids=(samples[number].token_ids + 1) % VOCABULARY)
    after_N, _ = policy(packed_chunk_of([*samples[:number], other, *samples[number + 1 :]], CPU))
    start = sum(sample.trained_tokens for sample in samples[:number])
    end = start + other.trained_tokens
    assert torch.equal(before_N[:start], after_N[:start])
    assert torch.equal(before_N[end:], after_N[end:])


def trained(model: PreTrainedModel, batches: list[RolloutBatch], **learner: object) -> tuple[list[Any], dict[str, Any]]:
    config = Config.model_validate({"learner": {"entropy_weight": 0.01, **learner}})
    trainer = Trainer(model, config, connect_ranks(config), version=batches[0].version)
    reports = [trainer.train(batch) for batch in batches]
    return reports, {name: weight.clone() for name, weight in trainer.named_weights()}


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama-untied"])
@pytest.mark.parametrize(
    "learner", [{}, {"proximal": "recomputed", "minibatches": 2}, {"gradient_checkpointing": True}]
)
def test_packing_changes_neither_losses_nor_gradients_nor_weights(kind: str, learner: dict[str, Any]) -> None:
    batches = [random_batch(version, lag=2, attempts=2) for version in range(2, 5)]
    plain, plain_weights = trained(random_model(kind), batches, layout="rows", share_prompts=False, **learner)
    packed, packed_weights = trained(random_model(kind), batches, layout="packed", microbatch_tokens=60, **learner)
    for one, other in zip(packed, plain, strict=True):
        assert (one.padding, other.padding > 0) == (0.0, True)
        assert one.computed_tokens < other.computed_tokens
        for name in ("loss", "grad_norm", "ess", "kl_k3", "entropy", "max_ratio"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-5)
    for name, weight in plain_weights.items():
        torch.testing.assert_close(packed_weights[name], weight, rtol=1e-3, atol=5e-5)


def test_batches_with_a_long_sequence_are_packed_and_others_are_not() -> None:
    batch = random_batch(0, attempts=4)
    rollout = batch.rollouts[0]
    tail = np.zeros(1100, np.int32)
    long = replace(
        rollout,
        token_ids=np.concatenate([rollout.token_ids, tail]),
        behavior_logp=np.concatenate([rollout.behavior_logp, np.full(1100, -5.5, np.float32)]),
        token_version=np.concatenate([rollout.token_version, tail]),
    )
    batches = [batch, replace(batch, version=1, rollouts=(long, *batch.rollouts[1:]))]
    (short_report, long_report), _ = trained(random_model("qwen2-tied"), batches)
    tokens = sum(len(rollout.token_ids) for rollout in batches[1].rollouts)
    assert short_report.computed_tokens < tokens - 1100  # prompts are shared
    assert (long_report.computed_tokens, long_report.padding) == (tokens, 0.0)


def test_a_trained_model_is_saved_with_its_own_attention(tmp_path: Path) -> None:
    model = random_model("qwen2-tied")
    trained(model, [random_batch(0)], layout="packed")
    model.save_pretrained(tmp_path)
    assert "azr" not in (tmp_path / "config.json").read_text()


def test_architectures_that_cannot_share_or_pack_are_found_out() -> None:
    policies = [policy_of(model) for model in (random_model("qwen2-tied"), mistral(4), mamba())]
    assert [can_share(policy, CPU, same_nats=CLOSE) for policy in policies] == [True, False, False]
    assert [can_pack(policy, CPU, same_nats=CLOSE) for policy in policies] == [True, True, False]
    samples = random_samples(0, [7, 4])
    expected_N = own_logp(mamba(), samples)
    rows_N, _ = policies[2](chunk_of([[sample] for sample in samples], CPU))
    torch.testing.assert_close(rows_N, expected_N, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what follows the output layer


class Doubled(LlamaForCausalLM):
    """An architecture that nobody knows: it doubles its logits."""

    def forward(self, *arguments: object, **options: object) -> CausalLMOutputWithPast:
        output = super().forward(*arguments, **options)
        output.logits = 2.0 * output.logits
        return output


HEADS = {
    "gemma2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.7)),
    "granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=0.4)),
    "cohere, multiplied": lambda: Cohere2ForCausalLM(Cohere2Config(**SHAPE, logit_scale=0.4)),
    "qwen3, plain": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "phi, biased": lambda: PhiForCausalLM(PhiConfig(**{name: SHAPE[name] for name in SHAPE if name != "head_dim"})),
}


@pytest.mark.parametrize("name", HEADS)
def test_known_heads_are_computed_in_blocks_and_agree_with_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = HEADS[name]().eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    samples = random_samples(0, [20, 9, 13])
    policy = policy_of(model)
    assert policy.head is not None
    policy.most_logits = 5 * VOCABULARY
    logp_N, _ = policy(chunk_of([[sample] for sample in samples], CPU))
    torch.testing.assert_close(logp_N, own_logp(model, samples), rtol=1e-4, atol=1e-4)


def test_an_unknown_head_is_left_to_the_model_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Doubled(random_model("llama-untied").config).eval()
    samples = random_samples(0, [8, 5])
    with caplog.at_level(logging.WARNING):
        policy = policy_of(model)
    assert policy.head is None
    assert "what Doubled does after its output layer is not known" in caplog.text
    logp_N, _ = policy(chunk_of([[sample] for sample in samples], CPU))
    torch.testing.assert_close(logp_N, own_logp(model, samples), rtol=1e-4, atol=1e-4)
    expected = functional.log_softmax(torch.zeros(VOCABULARY), -1)[0]
    assert (logp_N - expected).abs().max() > 0.1


def test_blocks_of_logits_change_no_training() -> None:
    batches = [random_batch(version, lag=2, per_cell=50) for version in range(2, 4)]
    learner = {"microbatch_tokens": 2**16, "layout": "packed"}  # all in one micro-batch
    whole, whole_weights = trained(random_model("llama-tied"), batches, **learner)
    in_blocks, blocks_weights = trained(random_model("llama-tied"), batches, logits_mb=1, **learner)
    for one, other in zip(in_blocks, whole, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    assert any(not torch.equal(blocks_weights[name], weight) for name, weight in whole_weights.items())
    for name, weight in whole_weights.items():
        torch.testing.assert_close(blocks_weights[name], weight, rtol=1e-3, atol=5e-5)
