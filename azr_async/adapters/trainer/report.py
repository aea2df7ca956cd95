"""What one step computed and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from azr_async.adapters.trainer.chunks import Chunk
from azr_async.algorithm import losses
from azr_async.algorithm.credit import CellStats
from azr_async.messages import Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step did; counts and means are those of the whole batch, over all ranks."""

    version: int
    """Of the weights after the step."""
    loss: float
    """Mean over the mini-batches, as is grad_norm."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    ess: float
    """Effective share of the computed tokens, on importance weights that are not truncated."""
    clip_fraction: float
    """Share of the computed tokens whose ratio or weight was cut by a bound of the objective."""
    kl_k1: float
    """KL(behaviour || learner) per token, nats."""
    kl_k3: float
    max_ratio: float
    entropy: float
    """Nats per token; 0 unless `learner.entropy_weight` asks for it."""
    lag_mean: float
    """Over the samples, in steps."""
    lag_max: int
    cells: Mapping[Cell, CellStats]
    trained_tokens: int
    """All tokens in the normaliser, also those of samples without advantage, which need not be computed."""
    trained_samples: int
    computed_samples: int
    computed_tokens: int
    """With prompts and padding; a shared prompt counts once."""
    padding: float
    """Share of the computed tokens that is padding."""
    idle: float
    """Share of the ranks' time that they wait for the slowest of them, as planned; 0 on one rank."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one update computes; all but `chunks` is of all ranks together."""

    chunks: Sequence[Chunk]
    """This rank's micro-batches, at least one."""
    samples: int
    tokens: int
    padding: float
    idle: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One optimizer update: the sums of all ranks."""

    loss: float
    entropy: float
    measures: Mapping[str, float]
    max_ratio: float
    grad_norm: float


def step_report(
    plans: Sequence[Plan],
    updates: Sequence[Update],
    lag_n: Sequence[int],
    cells: Mapping[Cell, CellStats],
    *,
    version: int,
    learning_rate: float,
    trained_tokens: int,
    seconds: float,
) -> StepReport:
    """Put the mini-batches of a step together."""
    total = {name: sum(update.measures[name] for update in updates) for name in losses.MEASURES}
    tokens = max(total["tokens"], 1.0)
    return StepReport(
        version=version,
        loss=_mean([update.loss for update in updates]),
        grad_norm=_mean([update.grad_norm for update in updates]),
        learning_rate=learning_rate,
        ess=losses.effective_sample_size(total["tokens"], total["weight"], total["weight_squared"]),
        clip_fraction=total["cut"] / tokens,
        kl_k1=total["kl_k1"] / tokens,
        kl_k3=total["kl_k3"] / tokens,
        max_ratio=max(update.max_ratio for update in updates),
        entropy=sum(update.entropy for update in updates) / tokens,
        lag_mean=_mean(lag_n),
        lag_max=max(lag_n),
        cells=cells,
        trained_tokens=trained_tokens,
        trained_samples=len(lag_n),
        computed_samples=sum(plan.samples for plan in plans),
        computed_tokens=sum(plan.tokens for plan in plans),
        padding=_mean([plan.padding for plan in plans]),
        idle=_mean([plan.idle for plan in plans]),
        seconds=seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
