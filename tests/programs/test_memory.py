"""The memory estimate: parameters counted as transformers counts them, activations and whole steps as measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from azr_async.adapters.engines.embedded.cache import SlotCache
from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.config import Config
from azr_async.messages import CELLS, Rollout, RolloutBatch
from azr_async.programs.fit import GB, learning_of
from azr_async.programs.memory import (
    SPARE_COLUMNS,
    Learning,
    Serving,
    activation_bytes,
    engine_estimate,
    learner_estimate,
)
from azr_async.programs.model_shapes import PUBLISHED, Shape, published_shape, shape_from, shape_of
from tests.live_bytes import LiveBytes
from tests.random_models import random_model, save_random_model

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
BIASES = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen2": (),
    "qwen3": ("attention_bias",),
}


def described(config: PreTrainedConfig) -> Shape:
    """The shape by way of the file that transformers writes."""
    shape = shape_from(json.loads(config.to_json_string()))
    assert shape is not None
    return shape


def counted(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", CLASSES)
@settings(max_examples=15)
@given(data=some.data())
def test_parameters_are_counted_as_transformers_counts_them(kind: str, data: some.DataObject) -> None:
    config_class, model_class = CLASSES[kind]
    heads = data.draw(some.sampled_from([2, 4, 6]))
    config = config_class(
        vocab_size=data.draw(some.integers(10, 99)),
        hidden_size=heads * data.draw(some.sampled_from([4, 10])),
        intermediate_size=data.draw(some.integers(1, 99)),
        num_hidden_layers=data.draw(some.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=data.draw(some.sampled_from([1, 2, heads])),
        tie_word_embeddings=data.draw(some.booleans()),
        **({"head_dim": data.draw(some.sampled_from([4, 16]))} if kind != "qwen2" else {}),
        **{bias: data.draw(some.booleans()) for bias in BIASES[kind]},
    )
    with torch.device("meta"):
        model = model_class(config)
    assert described(config).parameters == counted(model)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models_have_as_many_parameters_as_transformers_gives_their_shape(size: str) -> None:
    shape = PUBLISHED[size]
    config_class, model_class = CLASSES["llama" if "Llama" in size else "qwen2"]
    config = config_class(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.is_tied,
    )
    with torch.device("meta"):
        model = model_class(config)
    assert shape.parameters == counted(model)
    assert described(config) == shape


@pytest.mark.parametrize(
    ("hub_id", "billions"),
    [
        ("Qwen/Qwen2.5-0.5B", "0.49"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "1.54"),
        ("Qwen/Qwen2.5-Coder-3B", "3.09"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "7.62"),
        ("Qwen/Qwen2.5-14B", "14.77"),
        ("meta-llama/Llama-3.1-8B", "8.03"),
    ],
)
def test_a_model_is_known_by_its_name_with_the_size_on_its_model_card(hub_id: str, billions: str) -> None:
    shape = published_shape(hub_id)
    assert shape is not None
    assert f"{shape.parameters / GB:.2f}" == billions


@pytest.mark.parametrize(
    "path", ["Qwen/Qwen2.5-9B", "Qwen/Qwen2.5-7B-GPTQ", "a/b", "/no/such/model", "a\0b", "x" * 300]
)
def test_of_another_model_nothing_is_assumed(path: str) -> None:
    assert shape_of(path) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"model_type": "mamba"}', '{"model_type": "llama", "vocab_size": "x"}']
)
def test_a_config_that_does_not_tell_the_shape_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert shape_of(str(tmp_path)) is None


def test_a_folder_tells_its_shape_whatever_its_name(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama-untied")
    shape = shape_of(str(tmp_path))
    assert shape is not None
    assert shape.parameters == counted(random_model("llama-untied"))
    starter = shape_of("starter")
    assert starter is not None
    assert 0.3e6 < starter.parameters < 0.4e6


# ---------------------------------------------------------------- against what is measured

SHAPES = {
    "qwen2": {"hidden_size": 32, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 1},
    "llama": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6},
}


def small_model(kind: str, vocabulary: int, *, layers: int, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config_class, model_class = CLASSES[kind]
    config = config_class(
        vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=tied, pad_token_id=None, **SHAPES[kind]
    )
    model: PreTrainedModel = model_class(config).eval()
    return model


def peak_of_body(model: PreTrainedModel, tokens: int, *, autocast: bool) -> int:
    """Most bytes alive in one forward and backward pass through everything but the output layer."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    live = LiveBytes()
    with live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    return live.peak


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("way", ["float32", "autocast", "sharded"])
def test_activations_are_within_5_percent_of_what_is_measured(kind: str, way: str, is_checkpointed: bool) -> None:
    model = small_model(kind, vocabulary=64, layers=5)
    if way == "sharded":  # FSDP puts layers together in bfloat16
        model = model.bfloat16()
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    # What each token adds: weights and their gradients are in both.
    peaks = [peak_of_body(model, tokens, autocast=way == "autocast") for tokens in (1024, 2048)]
    learning = Learning(
        precision="float32" if way == "float32" else "bfloat16",
        ranks=2,
        is_sharded=way == "sharded",
        is_offloaded=False,
        is_checkpointed=is_checkpointed,
        tokens=1024,
        most_logits=1,
        bucket_bytes=1,
    )
    assert activation_bytes(described(model.config), learning) == pytest.approx(peaks[1] - peaks[0], rel=0.05)


def full_batch(samples: int, tokens: int) -> RolloutBatch:
    """Every sample as long as can be, nearly all of it trained."""
    prompt = 4
    rollouts = [
        Rollout(
            rollout_id=number,
            group_id=number,
            role=CELLS[number % len(CELLS)][0],
            task=CELLS[number % len(CELLS)][1],
            token_ids=np.full(tokens, number + 1, np.int32),
            behavior_logp=np.repeat([0.0, -7.0], [prompt, tokens - prompt]).astype(np.float32),
            token_version=np.repeat([-1, 0], [prompt, tokens - prompt]).astype(np.int32),
            reward=float(number % 5),
        )
        for number in range(samples)
    ]
    return RolloutBatch(version=0, rollouts=tuple(rollouts))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("logits_mb", [1, 64])
@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("llama", False)])
def test_a_whole_training_step_is_within_5_percent_of_what_is_measured(
    kind: str, tied: bool, logits_mb: int, is_checkpointed: bool
) -> None:
    config = Config.model_validate(
        {
            "learner": {
                "gradient_checkpointing": is_checkpointed,
                "logits_mb": logits_mb,
                "microbatch_tokens": 512,
                "share_prompts": False,
            },
            "engine": {"context_tokens": 128},
        }
    )
    model = small_model(kind, vocabulary=6000, layers=5, tied=tied)
    live = LiveBytes(model.parameters())
    trainer = Trainer(model, config, connect_ranks(config))
    batch = full_batch(samples=12, tokens=128)
    with live:  # the first step makes the optimizer's state, the second has it from the start
        trainer.train(batch)
        trainer.train(replace(batch, version=1))
    estimate = learner_estimate(described(model.config), learning_of(config))
    assert estimate.total_bytes == pytest.approx(live.peak, rel=0.05)


def test_the_embedded_engine_has_the_cache_that_is_estimated() -> None:
    model = random_model("qwen2-untied")
    with torch.no_grad():
        example = model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    live = LiveBytes()
    with live:
        cache = SlotCache(example, slots=3, context_tokens=50)
    assert cache.rows == 0
    serving = Serving(precision="float32", slots=3, context_tokens=50, bucket_bytes=1)
    parts = {part.name: part.size_bytes for part in engine_estimate(described(model.config), serving).parts}
    assert parts["key-value cache"] == live.live
    assert parts["weights"] == 4 * counted(model)
    assert SPARE_COLUMNS > 0


def test_sharding_divides_what_is_kept_and_offloading_removes_it() -> None:
    shape = PUBLISHED["7B"]
    whole = Learning(
        precision="bfloat16",
        ranks=4,
        is_sharded=False,
        is_offloaded=False,
        is_checkpointed=True,
        tokens=16_384,
        most_logits=2**26,
        bucket_bytes=2**26,
    )
    kept = [
        learner_estimate(shape, learning).phase_bytes("always")
        for learning in (whole, replace(whole, is_sharded=True), replace(whole, is_sharded=True, is_offloaded=True))
    ]
    assert kept == [16 * shape.parameters, 4 * shape.parameters, 0]
