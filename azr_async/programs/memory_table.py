"""The memory estimate as `--dry-run` prints it: part by part for the split that was asked for, in sum for others."""

from collections.abc import Iterator
from typing import Final

from rich.table import Table

from azr_async.config import Config
from azr_async.programs.fit import GB, Fit, changed, fit_of, gb
from azr_async.programs.memory import Estimate, Phase
from azr_async.programs.model_shapes import Shape

SPLITS: Final = ((1, 1, "shared"), (1, 1, "dedicated"), (2, 2, "dedicated"), (4, 4, "dedicated"), (6, 2, "dedicated"))
"""Inference and train GPUs, and whether they are the same, that are shown beside the split that was asked for."""

GPU_SIZES_GB: Final = (80, 141)

_PHASES: Final[dict[Phase, str]] = {
    "always": "",
    "logits": "at the logits",
    "layers": "at the layers",
    "end": "at the embedding",
    "prefill": "reading prompts",
    "decode": "drawing tokens",
    "push": "at a push",
}


def parts_table(config: Config, fit: Fit) -> Table:
    """What each process keeps on each of its GPUs."""
    table = _table("process", "part", "when")
    table.add_column("GB", justify="right")
    for process, estimate, fits in (
        (f"inference ({config.engine_kind})", fit.engine, fit.fits_engine),
        ("learner", fit.learner, fit.fits_learner),
    ):
        for number, (name, when, size) in enumerate(_rows(estimate)):
            table.add_row("" if number else process, name, when, size)
        table.add_row("", "at most" if fits else "at most: does not fit", "", gb(estimate.total_bytes))
    return table


def heading(config: Config, shape: Shape, fit: Fit, gpu_bytes: int) -> str:
    """What the numbers are about."""
    return (
        f"memory per GPU, estimated: {config.model.path}, {shape.parameters / GB:.2f} billion parameters, "
        f"{gb(fit.usable_bytes)} GB usable of {gb(gpu_bytes)} GB"
    )


def cache_note(config: Config, fit: Fit) -> str:
    """What the engine's cache has room for; the rest of its slots waits when sequences grow long."""
    engines = config.inference_workers
    fleet = f"each of {engines} engines" if engines > 1 else "the engine"
    return (
        "Of the moments, which follow each other, the largest counts. The key-value cache of "
        f"{fleet} holds {fit.full_sequences:.0f} sequences of {config.engine.context_tokens} tokens; engine.slots = "
        f"{config.engine.slots}."
    )


def splits_table(config: Config, shape: Shape) -> Table:
    """Engine + learner rank, GB per GPU: what they take at most with the same settings, and whether that fits."""
    table = _table("GPUs")
    for size_gb in GPU_SIZES_GB:
        table.add_column(f"{size_gb} GB each", justify="right")
    for inference, train, mode in SPLITS:
        if inference % config.placement.tensor_parallel:
            continue
        split = {"placement.inference_gpus": inference, "placement.train_gpus": train, "placement.mode": mode}
        fits = [fit_of(changed(config, split), shape, size_gb * GB) for size_gb in GPU_SIZES_GB]
        table.add_row(f"{inference} shared" if mode == "shared" else f"{inference} + {train}", *map(_verdict, fits))
    return table


def _rows(estimate: Estimate) -> Iterator[tuple[str, str, str]]:
    for part in estimate.parts:
        if part.size_bytes:
            yield part.name, _PHASES[part.phase], gb(part.size_bytes)


def _verdict(fit: Fit) -> str:
    sides = (("engine", fit.fits_engine), ("learner", fit.fits_learner))
    large = [side for side, fits in sides if not fits]
    too_large = "both" if len(large) > 1 or (large and fit.is_shared) else "".join(large)
    numbers = f"{gb(fit.engine.total_bytes)} + {gb(fit.learner.total_bytes)}"
    return f"{numbers}: {too_large} too large" if too_large else f"{numbers}: fits"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 3, 0, 0))
