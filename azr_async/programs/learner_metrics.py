"""The lines of metrics.jsonl and evaluations.jsonl: what goes into them, under which names."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Final, Self

from azr_async.adapters.telemetry import EVALUATIONS_FILE, METRICS_FILE, JsonLines, Trackers, nested, truncate_after
from azr_async.adapters.trainer import StepReport
from azr_async.config import Config
from azr_async.messages import CELLS, TASKS, Cell, EvaluationResult, RolloutBatch, cell_name

Record = dict[str, Any]

_BY_TASK: Final = ("valid_rate", "solve_rate", "library")


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """How one broadcast of weights went."""

    push_seconds: float = 0.0
    """Wall time until the last engine had them."""
    transfer_seconds: float = 0.0
    """Of it, from when every engine was ready to receive until the last had confirmed the bytes."""
    megabytes: float = 0.0
    """Sent to each engine."""
    pause_seconds: float = 0.0
    """Longest pause of an engine."""
    canary_max_logp_error: float = 0.0
    """Largest difference between an engine and the learner, nats."""

    @property
    def megabytes_per_second(self) -> float | None:
        """Bandwidth of the transfer, to each engine; None when nothing was sent."""
        return self.megabytes / self.transfer_seconds if self.transfer_seconds else None


class Books:
    """The files in which a run's progress is written down, and the dashboards."""

    def __init__(self, run_dir: Path, config: Config, *, resumed_step: int | None) -> None:
        if resumed_step is not None:
            for name in (METRICS_FILE, EVALUATIONS_FILE):
                truncate_after(run_dir / name, resumed_step)
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._evaluations = JsonLines(run_dir / EVALUATIONS_FILE)
        self._trackers = Trackers(config.telemetry.trackers, run_dir)

    def __enter__(self) -> Self:
        self._trackers.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._trackers.__exit__(*exc_info)
        self._evaluations.__exit__(*exc_info)
        self._metrics.__exit__(*exc_info)

    def enter_step(self, record: Record, evaluation: EvaluationResult | None) -> None:
        """Write down a step, with the evaluation of its weights if there was one."""
        if evaluation is not None:
            record = record | {"eval": accuracy(evaluation)}
            solved = [int(is_solved) for is_solved in evaluation.solved]
            line = {"step": record["step"], "version": evaluation.version, "solved": solved, "tasks": evaluation.tasks}
            self._evaluations.write(line)
        self._metrics.write(record)
        self._trackers.log(record, record["step"])


def step_record(
    batch: RolloutBatch,
    report: StepReport,
    push: Push,
    config: Config,
    *,
    wall_seconds: float,
    busy_share: float,
) -> Record:
    """One line of metrics.jsonl. A rate or a cell without data is null."""
    stats = nested({**batch.stats, **batch.notes})
    record = empty_record(report.version, config, wall_seconds=wall_seconds)
    for name in ("valid_rate", "solve_rate", "library", "tokens", "samples", "busy"):
        record[name] |= stats.pop(name, {})
    record["tokens"] |= {"trained": report.trained_tokens, "computed": report.computed_tokens}
    record["samples"] |= {
        "trained": report.trained_samples,
        "computed": report.computed_samples,
        "spanning": sum(rollout.spans_versions for rollout in batch.rollouts),
    }
    record["busy"] |= {"learner": busy_share}
    record["reward"] |= {cell_name(cell): stats_of.mean for cell, stats_of in report.cells.items()}
    record["lag"] |= {"mean": report.lag_mean, "max": report.lag_max}
    record |= {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "ess": report.ess,
        "clip_fraction": report.clip_fraction,
        "kl": {"k1": report.kl_k1, "k3": report.kl_k3},
        "max_ratio": report.max_ratio,
        "weights": _weights(push),
        "cells": {
            cell_name(cell): {"n": stats_of.count, "std": stats_of.std, **_lengths(batch, cell)}
            for cell, stats_of in report.cells.items()
        },
        "train_seconds": report.seconds,
        "padding": report.padding,
    }
    if config.learner.entropy_weight:
        record["entropy"] = report.entropy
    return record | {name: value for name, value in stats.items() if name not in record}


def empty_record(step: int, config: Config, *, wall_seconds: float, push: Push | None = None) -> Record:
    """The line of a step in which nothing was trained: step 0 holds the evaluation of the initial weights."""
    return {
        "step": step,
        "version": step,
        "wall_seconds": wall_seconds,
        "loss": None,
        "grad_norm": None,
        "learning_rate": None,
        "ess": None,
        "clip_fraction": None,
        "lag": {"mean": 0.0, "max": 0, "bound": config.flow.lag_limit},
        "reward": {cell_name(cell): None for cell in CELLS},
        **{name: dict.fromkeys(TASKS) for name in _BY_TASK},
        "tokens": {"generated": 0, "trained": 0, "dropped": 0},
        "samples": {"trained": 0, "dropped": 0},
        "busy": {"inference": 0.0, "learner": 0.0, "sandbox": 0.0},
        "weights": _weights(push or Push()),
    }


def accuracy(evaluation: EvaluationResult) -> Record:
    """`eval` of metrics.jsonl: share of solved held-out tasks per kind that occurs, over all, and how many.

    `valid` is the proposer's side: share of valid proposals per kind.
    """
    solved_by_task = {
        task: [ok for ok, its_task in zip(evaluation.solved, evaluation.tasks, strict=True) if its_task == task]
        for task in TASKS
    }
    shares = {task: sum(solved) / len(solved) for task, solved in solved_by_task.items() if solved}
    count = len(evaluation.solved)
    return shares | {"mean": sum(evaluation.solved) / max(1, count), "n": count, "valid": dict(evaluation.valid)}


def _lengths(batch: RolloutBatch, cell: Cell) -> Record:
    """Mean length and prompt length of a cell's samples, in tokens, and how the lengths scatter."""
    rollouts = [rollout for rollout in batch.rollouts if (rollout.role, rollout.task) == cell]
    prompts = [rollout.prompt_length for rollout in rollouts]
    lengths = [len(rollout.token_ids) - prompt for rollout, prompt in zip(rollouts, prompts, strict=True)]
    return {"tokens": fmean(lengths), "tokens_std": pstdev(lengths), "prompt_tokens": fmean(prompts)}


def _weights(push: Push) -> Record:
    return {
        "push_seconds": push.push_seconds,
        "transfer_seconds": push.transfer_seconds,
        "megabytes": push.megabytes,
        "megabytes_per_second": push.megabytes_per_second,
        "pause_seconds": push.pause_seconds,
        "canary_max_logp_error": push.canary_max_logp_error,
    }
