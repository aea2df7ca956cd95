"""Who runs where, and what is said when that does not fit."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, integers

from azr_async.config import Config
from azr_async.errors import ConfigError
from azr_async.programs.placement import check_engines, check_gpus, command, environment, gpus_needed, place

RUN_DIR = Path("/runs/one")


def config(inference: int, train: int, span: int = 1, mode: str = "dedicated", engine: str = "transformers") -> Config:
    placement = {"inference_gpus": inference, "train_gpus": train, "tensor_parallel": span, "mode": mode}
    return Config.model_validate({"placement": placement, "engine": {"kind": engine}})


def devices(settings: Config) -> dict[str, str]:
    return {placed.process: placed.devices for placed in place(settings)}


def test_without_gpus_everything_is_on_the_cpu() -> None:
    assert devices(Config()) == {"inference-0": "CPU", "selfplay": "CPU", "learner-0": "CPU"}


def test_workers_and_ranks_can_be_several_on_the_cpu() -> None:
    settings = Config.model_validate({"placement": {"inference_workers": 2, "learner_ranks": 2}})
    assert list(devices(settings)) == ["inference-0", "inference-1", "selfplay", "learner-0", "learner-1"]


def test_four_and_four_gpus_are_four_engines_and_four_ranks() -> None:
    assert devices(config(4, 4)) == {
        **{f"inference-{i}": f"cuda:{i}" for i in range(4)},
        "selfplay": "CPU",
        **{f"learner-{rank}": f"cuda:{4 + rank}" for rank in range(4)},
    }


def test_a_tensor_parallel_engine_spans_its_gpus() -> None:
    expected = {"inference-0": "cuda:0..1", "inference-1": "cuda:2..3", "selfplay": "CPU", "learner-0": "cuda:4"}
    assert devices(config(4, 1, span=2)) == expected


def test_a_shared_gpu_generates_and_learns() -> None:
    settings = config(1, 1, mode="shared")
    assert devices(settings) == {"inference-0": "cuda:0", "selfplay": "CPU", "learner-0": "cuda:0"}
    assert gpus_needed(settings) == 1


@given(engines=integers(1, 8), span=integers(1, 4), train=integers(1, 8), is_shared=booleans())
def test_every_wanted_gpu_is_used_once_per_side(engines: int, span: int, train: int, is_shared: bool) -> None:
    settings = config(engines * span, train, span, "shared" if is_shared else "dedicated")
    generating = [gpu for placed in place(settings) if placed.rank is None for gpu in placed.gpus]
    learning = [gpu for placed in place(settings) if placed.rank is not None for gpu in placed.gpus]
    assert generating == list(range(engines * span))
    assert learning == list(range(len(generating) * (not is_shared), len(generating) * (not is_shared) + train))
    assert max(generating + learning) + 1 == gpus_needed(settings)


@given(engines=integers(1, 4), span=integers(1, 4), train=integers(1, 8), found=integers(0, 7), is_shared=booleans())
def test_too_many_gpus_are_an_error_exactly_when_there_are_fewer(
    engines: int, span: int, train: int, found: int, is_shared: bool
) -> None:
    settings = config(engines * span, train, span, "shared" if is_shared else "dedicated")
    try:
        check_gpus(settings, found)
        fits = True
    except ConfigError:
        fits = False
    assert fits == (gpus_needed(settings) <= found)


@pytest.mark.parametrize(
    ("settings", "found", "advice"),
    [
        (config(4, 4), 0, "has no GPU. Leave --inference-gpus and --train-gpus out to run on the CPU"),
        (config(1, 1), 1, "--placement shared --engine.memory-share 0.4. For the CPU leave"),
        (config(4, 4), 6, "--inference-gpus 3 --train-gpus 3"),
        (config(4, 4, span=2), 6, "--inference-gpus 2 --train-gpus 4"),
        (config(8, 1, span=8), 4, "lower --placement.tensor-parallel below 4"),
    ],
)
def test_too_many_gpus_are_answered_with_what_fits(settings: Config, found: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_gpus(settings, found)


def test_a_placement_that_no_engine_can_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="the embedded engine runs on one GPU"):
        check_engines(config(4, 1, span=2))


def test_what_engines_can_fill_is_not_refused() -> None:
    for settings in (
        Config(),
        config(4, 4),
        config(4, 1, span=2, engine="vllm"),
        Config.model_validate({"placement": {"mode": "shared"}}),
    ):
        check_engines(settings)


def test_a_rank_alone_meets_nobody() -> None:
    everyone = place(Config())
    rank = environment(
        everyone[-1], everyone, {"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, rendezvous_port=4711, run_dir=RUN_DIR
    )
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & rank.keys()


def test_an_engine_sees_its_own_gpus_and_a_rank_all_train_gpus() -> None:
    everyone = place(config(2, 2))
    visible = {
        placed.process: environment(placed, everyone, {}, rendezvous_port=1, run_dir=RUN_DIR)["CUDA_VISIBLE_DEVICES"]
        for placed in everyone
    }
    assert visible == {"inference-0": "0", "inference-1": "1", "selfplay": "", "learner-0": "2,3", "learner-1": "2,3"}


def test_gpus_are_counted_among_those_the_user_left_visible() -> None:
    everyone = place(config(1, 1))
    base = {"CUDA_VISIBLE_DEVICES": "5, GPU-abc", "HOME": "/root"}
    rank = environment(everyone[-1], everyone, base, rendezvous_port=1, run_dir=RUN_DIR)
    assert (rank["CUDA_VISIBLE_DEVICES"], rank["HOME"]) == ("GPU-abc", "/root")


def test_ranks_meet_as_under_torchrun() -> None:
    everyone = place(Config.model_validate({"placement": {"learner_ranks": 2}}))
    rank = environment(everyone[-1], everyone, {}, rendezvous_port=4711, run_dir=RUN_DIR)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    assert [rank[name] for name in names] == ["1", "1", "2", "127.0.0.1", "4711", "1"]
    assert "RANK" not in environment(everyone[0], everyone, {}, rendezvous_port=4711, run_dir=RUN_DIR)


def test_only_the_learner_is_told_to_resume() -> None:
    folder = Path("/run")
    resumed = {
        placed.process: "--resume" in command(placed, run_dir=folder, wires_dir=folder, resume=folder)
        for placed in place(Config())
    }
    assert resumed == {"inference-0": False, "selfplay": False, "learner-0": True}
