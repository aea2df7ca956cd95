"""What fits which GPUs, what is proposed when something does not, and how a dry run tells it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from azr_async.config import Config
from azr_async.errors import ConfigError
from azr_async.programs.commandline import load, main, parse
from azr_async.programs.fit import GB, changed, engine_ways, fit_of, gb, learner_ways, options, problems
from azr_async.programs.model_shapes import PUBLISHED
from azr_async.programs.preflight import check

ROOT = Path(__file__).parents[2]
OFFICIAL = ("--config", str(ROOT / "configs" / "azr-official.yaml"))


def official(**changes: object) -> Config:
    """The published settings with others in their place, `section__field`."""
    return changed(load(parse(OFFICIAL)), {name.replace("__", "."): value for name, value in changes.items()})


@settings(max_examples=80)
@given(
    size=some.sampled_from(sorted(PUBLISHED)),
    split=some.sampled_from([(1, 1), (2, 2), (4, 4), (6, 2), (2, 6)]),
    gpu_gb=some.sampled_from([24, 48, 80, 141]),
    kind=some.sampled_from(["transformers", "vllm"]),
    sharding=some.sampled_from(["none", "full"]),
    is_checkpointed=some.booleans(),
    microbatch_tokens=some.sampled_from([4096, 16_384, 65_536]),
    slots=some.sampled_from([1, 56, 512]),
)
def test_what_is_proposed_fits_and_is_a_valid_configuration(
    size: str, split: tuple[int, int], gpu_gb: int, kind: str, sharding: str, slots: int, **learner: int
) -> None:
    config = official(
        placement__inference_gpus=split[0],
        placement__train_gpus=split[1],
        engine__kind=kind,
        engine__slots=slots,
        learner__sharding=sharding,
        learner__gradient_checkpointing=learner["is_checkpointed"],
        learner__microbatch_tokens=learner["microbatch_tokens"],
    )
    shape, gpu_bytes = PUBLISHED[size], gpu_gb * GB
    fit = fit_of(config, shape, gpu_bytes)
    assert (list(problems(config, shape, gpu_bytes)) == []) == (fit.fits_learner and fit.fits_engine)
    of_learner = [] if fit.fits_learner else learner_ways(config, shape, gpu_bytes)
    of_engine = [] if fit.fits_engine else engine_ways(config, shape, gpu_bytes)
    assert all(fit_of(changed(config, changes), shape, gpu_bytes).fits_learner for changes in of_learner)
    assert all(fit_of(changed(config, changes), shape, gpu_bytes).fits_engine for changes in of_engine)
    for changes in (*of_learner, *of_engine):
        Config.model_validate(changed(config, changes).model_dump())


@given(size=some.sampled_from(sorted(PUBLISHED)), ranks=some.integers(2, 16))
def test_another_learner_rank_never_needs_more_memory(size: str, ranks: int) -> None:
    totals = [
        fit_of(official(placement__train_gpus=gpus), PUBLISHED[size], 80 * GB).learner.total_bytes
        for gpus in (ranks, ranks + 1)
    ]
    assert totals[1] < totals[0]


@pytest.mark.parametrize(
    ("size", "changes", "advice"),
    [
        ("7B", {"learner__sharding": "none"}, "What fits: --learner.sharding full."),
        ("7B", {"learner__gradient_checkpointing": False}, "What fits: --learner.gradient-checkpointing true."),
        ("14B", {}, "What fits: --inference-gpus 3 --train-gpus 5, or --learner.cpu-offload true."),
        ("7B", {"placement__inference_gpus": 1, "placement__train_gpus": 1}, "What fits: --train-gpus 4."),
        ("7B", {"engine__kind": "transformers", "engine__slots": 400}, "What fits: --engine.slots "),
        ("14B", {"engine__memory_share": 0.4, "placement__train_gpus": 6}, "--placement.tensor-parallel 2"),
    ],
)
def test_what_does_not_fit_is_answered_with_the_nearest_that_does(
    size: str, changes: dict[str, Any], advice: str
) -> None:
    [told] = problems(official(**changes), PUBLISHED[size], 80 * GB)
    assert advice in told


def test_a_model_that_fits_nowhere_is_told() -> None:
    told = list(problems(official(), PUBLISHED["14B"], 8 * GB))
    assert len(told) == 2
    assert all("choose a smaller model" in text for text in told)


def test_what_is_too_much_for_shared_gpus_gets_a_smaller_share_or_gpus_of_its_own() -> None:
    both = {"placement__mode": "shared", "engine__kind": "vllm"}
    small = official(**both, placement__inference_gpus=2, placement__train_gpus=2, engine__memory_share=0.9)
    assert learner_ways(small, PUBLISHED["3B"], 141 * GB)[0].keys() == {"engine.memory_share"}
    large = official(**both, placement__inference_gpus=1, placement__train_gpus=1)
    ways = learner_ways(large, PUBLISHED["7B"], 80 * GB)
    assert ways
    assert "--placement dedicated --train-gpus" in options(ways[0])
    fit = fit_of(changed(large, ways[0]), PUBLISHED["7B"], 80 * GB)
    assert fit.fits_learner
    assert fit.fits_engine


@pytest.mark.parametrize("span", [3, 8])
def test_heads_that_cannot_be_divided_among_the_gpus_of_an_engine_are_told(span: int) -> None:
    config = official(placement__inference_gpus=24, placement__train_gpus=8, placement__tensor_parallel=span)
    (problem,) = problems(config, PUBLISHED["7B"], 80 * GB)
    assert problem.startswith(f"placement.tensor_parallel = {span}: the model's 28 attention heads")
    assert problem.endswith("Use one of 1, 2, 4, 7, 14, 28.")


def test_on_a_shared_gpu_both_sides_have_to_fit() -> None:
    alone = official(placement__train_gpus=2, placement__inference_gpus=2, engine__memory_share=0.5)
    beside = changed(alone, {"placement.mode": "shared"})
    shape = PUBLISHED["3B"]
    assert list(problems(alone, shape, 80 * GB)) == []
    [told] = problems(changed(beside, {"engine.memory_share": 0.9}), shape, 80 * GB)
    assert "beside the engine's" in told


def test_numbers_are_short_and_options_are_as_they_are_typed() -> None:
    assert [gb(number * GB) for number in (0.347, 0.95, 7.62, 121.8)] == ["0.35", "0.9", "7.6", "122"]
    assert (
        options({"placement.train_gpus": 8, "learner.cpu_offload": True}) == "--train-gpus 8 --learner.cpu-offload true"
    )


# ---------------------------------------------------------------- as a user meets it


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_dry_run_shows_every_part_and_other_splits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OFFICIAL, "--dry-run", "--placement.gpu-memory-gb", "80"], env={}) == 0
    text = capsys.readouterr().out
    assert "Qwen/Qwen2.5-7B, 7.62 billion parameters, 75.3 GB usable of 80.0 GB" in text
    parts = ("weights", "key-value cache", "master weights", "optimizer moments", "activations", "logits")
    assert [part for part in parts if part not in text] == []
    assert [split for split in ("1 shared", "1 + 1", "2 + 2", "4 + 4", "6 + 2") if split not in text] == []


def test_a_dry_run_says_when_nothing_is_known_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OFFICIAL, "--dry-run", "--model", "someone/something"], env={}) == 0
    assert "the shape of someone/something is unknown" in capsys.readouterr().out


def test_a_dry_run_without_gpus_estimates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run"], env={}) == 0
    assert "memory" not in capsys.readouterr().out.partition("placement ")[2]


def test_what_does_not_fit_is_not_started(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*OFFICIAL, "--placement.gpu-memory-gb", "24"]
    assert main([*small, "--dry-run"], env={}) == 2
    assert "It could not start: memory: each learner rank needs about" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="memory: each learner rank needs about"):
        check(load(parse(small)), output=None, resume=None)
