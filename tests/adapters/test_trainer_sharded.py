"""Weights spread over the ranks: the same training as on one, and checkpoints that any number of ranks can resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from azr_async.adapters.channels import wire
from azr_async.adapters.models import load_model
from azr_async.adapters.trainer import Crew, Trainer, connect_ranks, loading_device
from azr_async.config import Config
from tests.adapters import bfloat16_rank, sharded_rank
from tests.adapters.rank_processes import run_ranks
from tests.adapters.sharded_rank import CANARIES, LEARNERS, SAVED_STEP, STEPS, config_of
from tests.random_models import random_model, save_random_model


def on_one_rank(
    kind: str, source: Path, *, first: int, root: Path
) -> tuple[list[dict[str, float]], dict[str, Tensor], list[float]]:
    """Reports, weights and scores of the same steps in this process."""
    config = config_of(kind)
    accelerator = connect_ranks(config)
    trainer, model, tokenizer = sharded_rank.loaded(source, config, accelerator, version=first)
    crew = Crew(trainer, accelerator, encode=wire.encode)
    reports = sharded_rank.run(crew, range(first, STEPS), lambda: sharded_rank.save(root, crew, model, tokenizer))
    return reports, {name: weight.clone() for name, weight in crew.named_weights()}, crew.score(CANARIES).tolist()


def assert_same(
    results: Path, reports: list[dict[str, float]], weights: dict[str, Tensor], scores: list[float]
) -> None:
    """What the ranks wrote down is what one rank got."""
    measured = json.loads(results.with_suffix(".json").read_text())
    for many, one in zip(measured["reports"], reports, strict=True):
        assert many == pytest.approx(one, rel=2e-4, abs=1e-5)
    assert measured["scores"] == pytest.approx(scores, abs=1e-4)
    sharded = load_file(results.with_suffix(".weights"))
    assert sharded.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-3, atol=5e-5)


def test_two_sharded_ranks_do_what_one_does_and_resume_each_other(tmp_path: Path) -> None:
    expected = {}
    for seed, kind in enumerate(LEARNERS):
        save_random_model(tmp_path / kind, kind, seed)
        expected[kind] = on_one_rank(kind, tmp_path / kind, first=0, root=tmp_path / f"{kind}-one")
    run_ranks("tests.adapters.sharded_rank", tmp_path, 2)
    for kind in LEARNERS:
        reports, weights, scores = expected[kind]
        assert_same(tmp_path / f"{kind}-whole", reports, weights, scores)
        assert_same(tmp_path / f"{kind}-resumed", reports[SAVED_STEP:], weights, scores)
        saved = tmp_path / f"{kind}-whole" / "step-000005"
        one = tmp_path / f"{kind}-one" / "step-000005"
        theirs, ours = AutoModelForCausalLM.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(one)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(theirs.get_parameter(name), parameter, rtol=1e-3, atol=5e-5)
        again = on_one_rank(kind, saved, first=SAVED_STEP, root=tmp_path / "unused")
        assert_same(tmp_path / f"{kind}-resumed", *again)


def test_four_sharded_ranks_do_what_one_does(tmp_path: Path) -> None:
    for kind in ("qwen2-tied", "llama-untied"):
        save_random_model(tmp_path / kind, kind)
    run_ranks("tests.adapters.sharded_rank", tmp_path, 4)
    for kind in ("qwen2-tied", "llama-untied"):
        assert_same(tmp_path / f"{kind}-whole", *on_one_rank(kind, tmp_path / kind, first=0, root=tmp_path / "unused"))


def test_in_bfloat16_ranks_compute_in_it_but_keep_weights_and_sum_gradients_in_float32(tmp_path: Path) -> None:
    run_ranks("tests.adapters.bfloat16_rank", tmp_path, 2)
    sharded = json.loads((tmp_path / "full.json").read_text())
    copied = json.loads((tmp_path / "none.json").read_text())
    precise = Config.model_validate(bfloat16_rank.SETTINGS | {"model": {"precision": "float32"}})
    expected = bfloat16_rank.trained(precise, connect_ranks(precise))
    for rounded in (sharded, copied):
        for name in ("losses", "grad_norms"):
            assert rounded[name] == pytest.approx(expected[name], rel=0.05, abs=0.02)
            assert rounded[name] != expected[name]  # it is not float32 after all
        # Steps far below what bfloat16 can hold of a weight add up all the same.
        assert rounded["moved"] == pytest.approx(expected["moved"], rel=0.3)


def test_a_rank_alone_has_all_of_the_weights() -> None:
    config = Config()
    accelerator = connect_ranks(config)
    trainer = Trainer(random_model("qwen2-tied"), config, accelerator)
    assert not trainer.is_sharded
    assert trainer.model_state() is None
    assert loading_device(config, accelerator).type == "cpu"


def test_a_model_without_content_has_the_shapes_of_the_one_that_is_read(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    (model, _), (shapes, _) = load_model(str(tmp_path), "float32", "cpu"), load_model(str(tmp_path), "float32", "meta")
    expected = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    assert {name: (parameter.shape, parameter.dtype) for name, parameter in shapes.named_parameters()} == expected
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
