"""From rollouts to training samples: what must not be trained, what each rollout earned, what it weighs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from azr_async.algorithm.credit import CellStats, shuffled_within_cells, task_relative_advantages, token_weights
from azr_async.algorithm.staleness import check_lag, lag_of
from azr_async.config import Config
from azr_async.errors import TrainingError
from azr_async.messages import Cell, RolloutBatch, cell_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sequence to train on; arrays have one entry per token, `prompt_length` of them given."""

    token_ids: NDArray[np.int32]
    behavior_logp: NDArray[np.float32]
    token_version: NDArray[np.int32]
    prompt_length: int
    advantage: float = 0.0
    weight: float = 0.0
    """Of each of its tokens in the loss."""
    temperature: float = 1.0

    @property
    def trained_tokens(self) -> int:
        """Tokens of the completion."""
        return len(self.token_ids) - self.prompt_length

    def moves_weights(self, *, entropy_weight: float) -> bool:
        """Whether it must be computed; it counts in the normaliser in any case."""
        return self.weight != 0.0 and (self.advantage != 0.0 or entropy_weight != 0.0)


def unrewarded(token_ids: NDArray[np.int32], *, prompt_length: int = 1) -> Sample:
    """A sequence to be scored only, after its prompt."""
    return Sample(
        token_ids=token_ids,
        behavior_logp=np.zeros(len(token_ids), np.float32),
        token_version=np.zeros(len(token_ids), np.int32),
        prompt_length=prompt_length,
    )


def checked_lags(batch: RolloutBatch, version: int, config: Config) -> list[int]:
    """[n] age of each rollout's oldest trained token, in steps.

    Raises:
        TrainingError: the learner at `version` must not be trained on `batch`.
    """
    max_lag, learner = config.flow.lag_limit, config.learner
    if learner.objective == "none" and max_lag > 0 and not learner.allow_uncorrected:
        raise TrainingError(
            f"learner.objective = none would train data up to {max_lag} steps old without correction. Choose "
            "decoupled-ppo, masked-is or cispo, set flow.max_lag to 0, or insist with learner.allow_uncorrected."
        )
    if batch.version != version:
        raise TrainingError(
            f"a batch for version {batch.version} reached the learner at version {version}: the two have lost step. "
            "Resume from the last checkpoint; if it happens again, report it with both logs."
        )
    if not batch.rollouts:
        raise TrainingError(f"the batch for version {version} is empty. Look at the end of the selfplay log.")
    for rollout in batch.rollouts:
        if not 0 < rollout.prompt_length < len(rollout.token_ids) or rollout.token_version[-1] < 0:
            raise TrainingError(
                f"rollout {rollout.rollout_id} ({cell_name((rollout.role, rollout.task))}) has {rollout.prompt_length} "
                f"prompt tokens of {len(rollout.token_ids)}, so there is nothing to train on. "
                "Self-play must not send it: report this with the selfplay log."
            )
    check_lag(batch.rollouts, version=version, max_lag=max_lag)
    return [lag_of(rollout, version) for rollout in batch.rollouts]


def credited(batch: RolloutBatch, config: Config) -> tuple[list[list[Sample]], dict[Cell, CellStats]]:
    """The batch as `learner.minibatches` lists of samples, and the reward statistics of each cell.

    Advantages are relative to the whole batch; weights are normalised per mini-batch, each being one update.
    """
    rollouts, learner = batch.rollouts, config.learner
    cells: list[Cell] = [(rollout.role, rollout.task) for rollout in rollouts]
    rewards = np.array([rollout.reward for rollout in rollouts])
    prompt_lengths = [rollout.prompt_length for rollout in rollouts]
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts]) - prompt_lengths
    seed = (config.run.seed, batch.version)
    if config.control.shuffle_rewards:
        rewards = shuffled_within_cells(rewards, cells, seed)
    advantages, stats = task_relative_advantages(rewards, lengths, cells, learner.normalise)
    # Greedy samples (temperature 0) are scored at 1.
    temperature = {"propose": config.propose.temperature or 1.0, "solve": config.solve.temperature or 1.0}
    parts = []
    for members in _parts(len(rollouts), learner.minibatches, seed):
        weights = token_weights(
            lengths[members],
            [cells[member] for member in members],
            aggregation=learner.aggregation,
            cell_weights=learner.cell_weights,
            emphasis={cell: learner.propose_weight for cell in cells if cell[0] == "propose"},
        )
        parts.append(
            [
                Sample(
                    token_ids=rollouts[member].token_ids,
                    behavior_logp=rollouts[member].behavior_logp,
                    token_version=rollouts[member].token_version,
                    prompt_length=prompt_lengths[member],
                    advantage=float(advantages[member]),
                    weight=float(weight),
                    temperature=temperature[rollouts[member].role],
                )
                for member, weight in zip(members, weights, strict=True)
            ]
        )
    return parts, stats


def _parts(count: int, minibatches: int, seed: Sequence[int]) -> list[NDArray[np.intp]]:
    if minibatches == 1:
        return [np.arange(count)]
    order = np.random.default_rng(list(seed)).permutation(count)
    return [part for part in np.array_split(order, minibatches) if len(part)]
