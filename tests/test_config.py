"""The presets hold what they promise, and every setting documents itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import sampled_from
from pydantic import BaseModel, ValidationError

from azr_async.config import Config
from azr_async.errors import ConfigError
from azr_async.programs.commandline import load, parse
from azr_async.programs.fit import GB, problems
from azr_async.programs.folders import config_text
from azr_async.programs.model_shapes import shape_of
from azr_async.programs.presets import read_tree
from azr_async.programs.settings_help import expected, setting_names

PRESETS = Path(__file__).parents[1] / "configs"

PUBLISHED = {
    "run.steps": 500,
    "model.path": "Qwen/Qwen2.5-7B",
    "model.dialogue": "azr-base",
    "model.precision": "bfloat16",
    "engine.context_tokens": 6144 + 8096,
    "flow.max_lag": 0,
    "flow.tasks": ("deduction", "abduction", "induction"),
    "flow.propose_samples": 64,
    "flow.solve_samples": 64,
    "propose.references": 6,
    "propose.induction_pairs": 10,
    "propose.temperature": 1.0,
    "propose.top_p": 1.0,
    "propose.max_tokens": 8096,
    "propose.determinism_runs": 2,
    "solve.attempts": 8,
    "solve.trained_attempts": 1,
    "solve.temperature": 1.0,
    "solve.top_p": 1.0,
    "solve.max_tokens": 8096,
    "reward.proposer_extreme": -0.5,
    "library.capacity": 16384,
    "library.seed_tasks": 64 * 4,
    "sandbox.wall_seconds": 10.0,
    "learner.learning_rate": 1e-6,
    "learner.warmup_steps": 0,
    "learner.betas": (0.9, 0.999),
    "learner.weight_decay": 0.01,
    "learner.clip_norm": 1.0,
    "learner.clip_low": 0.2,
    "learner.clip_high": 0.2,
    "learner.minibatches": 1,
    "learner.normalise": "token",
    "learner.aggregation": "token",
    "learner.cell_weights": "equal",
    "learner.propose_weight": 1.0,
    "learner.entropy_weight": 0.001,
}


def preset(name: str) -> Config:
    return load(parse(["--config", str(PRESETS / name)]))


def flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_starter_preset_is_the_default() -> None:
    assert preset("starter-cpu.yaml") == Config() == load(parse([]))


def test_the_official_preset_equals_the_published_run() -> None:
    ours = dict(flat(preset("azr-official.yaml")))
    assert {name: ours[name] for name in PUBLISHED} == PUBLISHED


def test_the_asynchronous_preset_differs_from_the_published_run_where_it_says() -> None:
    official, ours = dict(flat(preset("azr-official.yaml"))), dict(flat(preset("azr-async-7b.yaml")))
    different = {name: value for name, value in ours.items() if value != official[name]}
    assert different == {
        "run.name": "azr-async-7b",
        "flow.max_lag": 4,
        "flow.solve_samples": 512,
        "solve.trained_attempts": 8,
        "learner.dual_clip": 3.0,
    }


@pytest.mark.parametrize(
    ("name", "model", "gpus"),
    [
        ("azr-3b.yaml", "Qwen/Qwen2.5-3B", 2),
        ("azr-coder-3b.yaml", "Qwen/Qwen2.5-Coder-3B", 2),
        ("azr-coder-7b.yaml", "Qwen/Qwen2.5-Coder-7B", 8),
        ("azr-14b.yaml", "Qwen/Qwen2.5-14B", 8),
        ("azr-coder-14b.yaml", "Qwen/Qwen2.5-Coder-14B", 8),
        ("azr-llama-8b.yaml", "meta-llama/Llama-3.1-8B", 8),
    ],
)
def test_a_preset_for_another_model_differs_from_the_published_run_only_in_what_it_is_for(
    name: str, model: str, gpus: int
) -> None:
    official, ours = dict(flat(preset("azr-official.yaml"))), dict(flat(preset(name)))
    different = {setting for setting, value in ours.items() if value != official[setting]}
    of_llama = {"library.seed_tasks"} if "llama" in name else set()
    assert different - {f"placement.{field}" for field in ("inference_gpus", "train_gpus", "tensor_parallel")} == {
        "run.name",
        "model.path",
        *of_llama,
    }
    assert (ours["run.name"], ours["model.path"]) == (Path(name).stem, model)
    assert ours["placement.inference_gpus"] + ours["placement.train_gpus"] == gpus


@pytest.mark.parametrize("name", sorted(path.name for path in PRESETS.iterdir()))
@pytest.mark.parametrize("gpu_gb", [80, 141])
def test_a_preset_fits_the_gpus_that_it_asks_for(name: str, gpu_gb: int) -> None:
    config = preset(name)
    shape = shape_of(config.model.path)
    assert shape is not None
    assert list(problems(config, shape, gpu_gb * GB)) == []


def test_a_file_changes_its_base_and_the_base_of_that(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "bottom.yaml").write_text("run: {steps: 1, seed: 1}\nflow: {max_lag: 7}")
    (tmp_path / "deep" / "middle.yaml").write_text("base: ../bottom.yaml\nrun: {steps: 2, seed: 2}")
    (tmp_path / "top.yaml").write_text("base: deep/middle.yaml\nrun: {steps: 3}")
    assert read_tree(tmp_path / "top.yaml") == {"run": {"steps": 3, "seed": 2}, "flow": {"max_lag": 7}}


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("none.yaml", "No such file"),
        ("top.yaml", "is based on this file in turn"),
        ("circle.yaml", "is based on this file in turn"),
        ("3", "3 is not the name of a file"),
        ("[a]", "is not the name of a file"),
        ('"a\\0b"', "is not the name of a file"),
    ],
)
def test_a_base_that_cannot_be_is_told(base: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "circle.yaml").write_text("base: top.yaml")
    (tmp_path / "top.yaml").write_text(f"base: {base}")
    with pytest.raises(ConfigError, match=told):
        read_tree(tmp_path / "top.yaml")


@given(name=sampled_from(sorted(path.name for path in PRESETS.iterdir())))
def test_a_configuration_survives_its_own_file(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config_text(preset(name)))
    assert load(parse(["--config", str(path)])) == preset(name)


@pytest.mark.parametrize("name", sorted(path.name for path in PRESETS.iterdir()))
def test_a_preset_names_only_settings(name: str) -> None:
    named = {f"{section}.{field}" for section, fields in read_tree(PRESETS / name).items() for field in fields}
    assert named <= set(setting_names())


def test_every_setting_says_what_it_is_for() -> None:
    undocumented = [
        f"{name}.{field}"
        for name, section in Config()
        for field, info in type(section).model_fields.items()
        if not info.description
    ]
    assert undocumented == []


def test_every_setting_says_what_it_takes() -> None:
    assert [name for name in setting_names() if not expected(name)] == []


@pytest.mark.parametrize(
    ("tree", "way_out"),
    [
        ({"learner": {"objective": "none"}}, "set flow.max_lag to 0"),
        ({"engine": {"context_tokens": 32}}, "Raise engine.context_tokens"),
        ({"flow": {"solve_samples": 100}}, "Use 96"),
        ({"flow": {"solve_samples": 32}}, "Raise flow.solve_samples to 64"),
        ({"solve": {"trained_attempts": 9}}, "Lower trained_attempts to 8"),
        ({"library": {"capacity": 3}}, "Raise the capacity"),
        ({"flow": {"tasks": ["induction"]}}, "Add deduction or abduction"),
        ({"learner": {"dual_clip": 0.5}}, "Use more than 1, or 0 for none"),
        ({"learner": {"ratio_floor": 3.0}}, "Lower ratio_floor"),
        ({"placement": {"inference_gpus": 2}}, "Set train_gpus to 1 or more"),
        ({"placement": {"inference_gpus": 3, "train_gpus": 1, "tensor_parallel": 2}}, "Use 2 or 4 inference GPUs"),
        ({"placement": {"tensor_parallel": 2}}, "Set inference_gpus to a multiple of 2"),
        ({"placement": {"inference_gpus": 2, "train_gpus": 2, "inference_workers": 1}}, "Leave inference_workers out"),
        ({"placement": {"inference_gpus": 2, "train_gpus": 2, "learner_ranks": 1}}, "Leave learner_ranks out"),
    ],
)
def test_an_impossible_combination_tells_the_way_out(tree: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ValidationError, match=way_out):
        Config.model_validate(tree)
