"""Loading a model: what is there is loaded as asked, what is wrong is said before anything runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from azr_async.adapters.models import load_model
from azr_async.errors import CheckpointError
from tests.random_models import random_model, save_random_model


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama-untied"])
def test_a_saved_model_comes_back_with_its_tokenizer(tmp_path: Path, kind: str) -> None:
    save_random_model(tmp_path, kind, seed=3)
    model, tokenizer = load_model(str(tmp_path), "float32", "cpu")
    for name, parameter in random_model(kind, 3).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert not model.training
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"


def test_precision_is_as_asked(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    model, _ = load_model(str(tmp_path), "bfloat16", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_starter_is_shipped() -> None:
    model, tokenizer = load_model("starter", "float32", "cpu")
    assert tokenizer.eos_token_id is not None
    assert model.config.vocab_size >= len(tokenizer)


@pytest.mark.parametrize("path", ["/no/such/folder", "nonsense", "./nothing/here/at all"])
def test_a_missing_model_is_told_without_asking_the_hub(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no model folder .* Set model.path"):
        load_model(path, "float32", "cpu")


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        load_model(str(tmp_path), "float32", "cpu")


def without_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:300])


@pytest.mark.parametrize(
    "damage",
    [
        without_norm,
        cut("model.safetensors"),
        cut("tokenizer.json"),
        cut("config.json"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "tokenizer.json").unlink(),
    ],
    ids=["lacks a parameter", "cut weights", "cut tokenizer", "cut config", "no weights", "no tokenizer"],
)
def test_a_damaged_model_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save_random_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=r"Point model\.path at"):
        load_model(str(tmp_path), "float32", "cpu")
