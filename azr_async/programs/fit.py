"""Does a configuration fit its GPUs, and if not: what is the nearest one that does?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from azr_async.config import Config
from azr_async.programs import memory
from azr_async.programs.memory import Estimate
from azr_async.programs.model_shapes import Shape

GB: Final = 1_000_000_000

MOST_GPUS: Final = 16
"""Beyond it no split is proposed."""

ROOM_TO_SPARE: Final = 0.95
"""Of a GPU: what is proposed fits in this much of it, for the estimate may be a little low."""

Changes = Mapping[str, Any]
"""Values by their dotted setting names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a learner rank and an engine need of a GPU each."""

    learner: Estimate
    engine: Estimate
    usable_bytes: int
    """Of a GPU, without the reserve."""
    full_sequences: float
    """Sequences of full length that the engine's cache holds, on all GPUs that it spans."""
    is_shared: bool
    """Both are on the same GPU."""

    @property
    def fits_learner(self) -> bool:
        """On a GPU of its own, or beside the engine."""
        beside = self.engine.total_bytes if self.is_shared else 0
        return self.learner.total_bytes + beside <= self.usable_bytes

    @property
    def fits_engine(self) -> bool:
        """With room for at least one sequence of full length."""
        return self.engine.total_bytes <= self.usable_bytes and self.full_sequences >= 1


def fit_of(config: Config, shape: Shape, gpu_bytes: int) -> Fit:
    """The estimate of a configuration on GPUs of `gpu_bytes` each."""
    usable_bytes = gpu_bytes - memory.reserve_bytes(gpu_bytes)
    if config.engine_kind == "vllm":
        engine, full_sequences = _paged(config, shape, gpu_bytes)
    else:
        engine, full_sequences = memory.engine_estimate(shape, _serving(config)), float(config.engine.slots)
    return Fit(
        learner=memory.learner_estimate(shape, learning_of(config)),
        engine=engine,
        usable_bytes=usable_bytes,
        full_sequences=full_sequences,
        is_shared=config.placement.mode == "shared",
    )


def problems(config: Config, shape: Shape, gpu_bytes: int) -> Iterator[str]:
    """What does not fit, each with the nearest settings that do."""
    span = config.placement.tensor_parallel
    if shape.heads % span:
        spans = ", ".join(str(count) for count in range(1, shape.heads + 1) if shape.heads % count == 0)
        yield (
            f"placement.tensor_parallel = {span}: the model's {shape.heads} attention heads cannot be divided among so "
            f"many GPUs. Use one of {spans}."
        )
        return
    fit = fit_of(config, shape, gpu_bytes)
    usable = f"{gb(fit.usable_bytes)} GB of a {gb(gpu_bytes)} GB GPU can be used"
    if not fit.fits_engine:
        needs = f"an engine needs about {gb(fit.engine.total_bytes)} GB on each of its GPUs"
        if config.engine_kind == "vllm":
            needs = (
                f"engine.memory_share = {config.engine.memory_share:g} leaves no key-value cache for a sequence of "
                f"engine.context_tokens = {config.engine.context_tokens}"
            )
        yield f"memory: {needs}, but {usable}. {_way_out(engine_ways(config, shape, gpu_bytes))}"
    if not fit.fits_learner and not (fit.is_shared and not fit.fits_engine):
        needs = f"each learner rank needs about {gb(fit.learner.total_bytes)} GB"
        beside = f" beside the engine's {gb(fit.engine.total_bytes)} GB" if fit.is_shared else ""
        yield f"memory: {needs}{beside}, but {usable}. {_way_out(learner_ways(config, shape, gpu_bytes))}"


def learner_ways(config: Config, shape: Shape, gpu_bytes: int) -> list[Changes]:
    """The fewest changed settings with which the learner fits, on its GPUs and on more of them."""

    def fits(changes: Changes) -> bool:
        fit = fit_of(changed(config, changes), shape, int(gpu_bytes * ROOM_TO_SPARE))
        return fit.fits_learner and (fit.fits_engine or not fit.is_shared)

    here = next(filter(fits, [*_savings(config), *_smaller_shares(config)]), None)
    if here is not None:
        return [here]
    offloaded = next(filter(fits, _offloads(config)), None)
    wider = ({**gpus, **saved} for gpus in _wider(config) for saved in ({}, *_savings(changed(config, gpus))))
    ways = (next(filter(fits, wider), None), offloaded)
    return [changes for changes in ways if changes is not None]


def engine_ways(config: Config, shape: Shape, gpu_bytes: int) -> list[Changes]:
    """Fewer slots where the cache is laid out for all of them, and engines that span more GPUs where they can."""

    def fits(changes: Changes) -> bool:
        return fit_of(changed(config, changes), shape, int(gpu_bytes * ROOM_TO_SPARE)).fits_engine

    ways: list[Changes] = []
    if config.engine_kind == "transformers":
        low, high = 0, config.engine.slots
        while low < high:  # the most that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits({"engine.slots": middle}) else (low, middle - 1)
        ways += [{"engine.slots": low}] if low else []
    if config.engine.kind != "transformers" or not ways:
        wider = (dict(changes) for changes in _spans(config, shape))
        ways += [changes for changes in [next(filter(fits, wider), None)] if changes is not None]
    return ways


def learning_of(config: Config) -> memory.Learning:
    """What the learner's settings mean for its memory."""
    learner = config.learner
    # The same rule as the trainer's.
    is_sharded = config.learner_ranks > 1 and learner.sharding == "full"
    return memory.Learning(
        precision=config.model.precision,
        ranks=config.learner_ranks,
        is_sharded=is_sharded,
        is_offloaded=is_sharded and learner.cpu_offload,
        is_checkpointed=learner.gradient_checkpointing,
        # A sequence longer than a micro-batch travels alone.
        tokens=max(learner.microbatch_tokens, config.engine.context_tokens),
        most_logits=learner.logits_mb * 2**20 // memory.FLOAT32_BYTES,
        bucket_bytes=config.weights.bucket_mb * 2**20,
    )


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with other values; they are not validated again."""
    for name, value in changes.items():
        section, field = name.split(".")
        part = dict(config)[section].model_copy(update={field: value})
        config = config.model_copy(update={section: part})
    return config


def gb(size_bytes: float) -> str:
    """Three digits at most: 0.35, 7.6, 122."""
    number = size_bytes / GB
    return f"{number:.0f}" if abs(number) >= 99.5 else f"{number:.1f}" if abs(number) >= 0.95 else f"{number:.2f}"


def options(changes: Changes) -> str:
    """As they are typed."""
    short = {"placement.train_gpus": "train-gpus", "placement.inference_gpus": "inference-gpus"}
    short["placement.mode"] = "placement"
    return " ".join(
        f"--{short.get(name, name.replace('_', '-'))} {str(value).lower()}" for name, value in changes.items()
    )


def _serving(config: Config) -> memory.Serving:
    return memory.Serving(
        precision=config.model.precision,
        slots=config.engine.slots,
        context_tokens=config.engine.context_tokens,
        bucket_bytes=config.weights.bucket_mb * 2**20,
    )


def _paged(config: Config, shape: Shape, gpu_bytes: int) -> tuple[Estimate, float]:
    precision, span = config.model.precision, config.placement.tensor_parallel
    estimate = memory.paged_estimate(
        shape,
        memory.PagedServing(
            precision=precision,
            span=span,
            slots=config.engine.slots,
            bucket_bytes=config.weights.bucket_mb * 2**20,
            share_bytes=int(config.engine.memory_share * gpu_bytes) - memory.reserve_bytes(gpu_bytes),
        ),
    )
    sequence_bytes = config.engine.context_tokens * memory.cache_bytes_per_token(shape, precision, span)
    return estimate, max(0.0, estimate.parts[-1].size_bytes / sequence_bytes)


def _savings(config: Config) -> list[Changes]:
    """Settings that save memory on the learner's GPUs, few at a time before many."""
    learner = config.learner
    single: list[Changes] = []
    if config.learner_ranks > 1 and learner.sharding == "none":
        single.append({"learner.sharding": "full"})
    if not learner.gradient_checkpointing:
        single.append({"learner.gradient_checkpointing": True})
    if learner.microbatch_tokens > config.engine.context_tokens:
        single.append({"learner.microbatch_tokens": config.engine.context_tokens})
    sets = [chosen for count in range(1, len(single) + 1) for chosen in combinations(single, count)]
    return [{name: value for changes in chosen for name, value in changes.items()} for chosen in sets]


def _smaller_shares(config: Config) -> Iterator[Changes]:
    """Less of a shared GPU for vLLM, alone before together with what else saves memory."""
    if config.placement.mode == "shared" and config.engine_kind == "vllm":
        shares = [tenths / 10 for tenths in range(9, 0, -1) if tenths / 10 < config.engine.memory_share]
        for saved in ({}, *_savings(config)):
            yield from ({**saved, "engine.memory_share": share} for share in shares)


def _offloads(config: Config) -> list[Changes]:
    """The same with the sharded weights in the host's memory: slow, so it comes last."""
    choices: list[Changes] = [{}, *_savings(config)]
    return [
        {**changes, "learner.cpu_offload": True}
        for changes in choices
        if learning_of(changed(config, changes)).is_sharded
    ]


def _wider(config: Config) -> Iterator[Changes]:
    """More GPUs that learn: first some of those that generate, then more GPUs in all."""
    placement = config.placement
    span, train = placement.tensor_parallel, placement.train_gpus
    if placement.mode == "dedicated":
        for inference in range(placement.inference_gpus - span, 0, -span):
            yield {
                "placement.inference_gpus": inference,
                "placement.train_gpus": train + placement.inference_gpus - inference,
            }
        yield from ({"placement.train_gpus": more} for more in (2, 4, 8, MOST_GPUS) if more > train)
    else:
        yield from (
            {"placement.mode": "dedicated", "placement.train_gpus": more} for more in (1, 2, 4, 8) if more >= train
        )


def _spans(config: Config, shape: Shape) -> Iterator[Changes]:
    """Engines of more GPUs each, on as many GPUs as there are if that can be."""
    placement = config.placement
    kind = {} if config.engine_kind == "vllm" else {"engine.kind": "vllm"}
    least = placement.tensor_parallel if kind else placement.tensor_parallel + 1
    for span in (1, 2, 4, 8):
        if span >= least and shape.heads % span == 0:
            gpus = -(-placement.inference_gpus // span) * span
            more = {} if gpus == placement.inference_gpus else {"placement.inference_gpus": gpus}
            yield {**kind, **({"placement.tensor_parallel": span} if span > 1 else {}), **more}


def _way_out(ways: list[Changes]) -> str:
    if not ways:
        return "No setting makes it fit with room to spare: choose a smaller model, or lower engine.context_tokens."
    return f"What fits: {', or '.join(options(changes) for changes in ways)}."
