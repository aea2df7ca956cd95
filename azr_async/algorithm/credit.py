"""Who earned what: the proposer's reward, task-relative advantages, and the weight of each token in the loss."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

CellKey = TypeVar("CellKey", bound=Hashable)
Floats = NDArray[np.float64]

VARIANCE_FLOOR: Final = 1e-8
"""Added to the variance before the square root, as in the published code; dimensionless."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellStats:
    """The rewards of one (role, task) cell in one batch, as they were normalised."""

    count: int
    """Rollouts in the cell."""
    mean: float
    std: float


def learnability(successes: int, attempts: int, extreme: float) -> float:
    """Reward of a valid proposal: hardest tasks that are still solved earn most.

        r = successes / attempts;   1 - r if 0 < r < 1, else `extreme`

    Zhao et al. 2025 (Absolute Zero), arXiv:2505.03335, the propose reward of section 3.1; there `extreme` is 0, in
    the published code it is -0.5.

    Raises:
        ValueError: no attempts, or more successes than attempts.
    """
    if not 0 <= successes <= attempts or attempts == 0:
        raise ValueError(f"{successes} successes in {attempts} attempts")
    return 1.0 - successes / attempts if 0 < successes < attempts else extreme


def task_relative_advantages(
    rewards: ArrayLike,
    lengths: ArrayLike,
    cells: Sequence[CellKey],
    mode: Literal["sample", "token"] = "sample",
) -> tuple[Floats, dict[CellKey, CellStats]]:
    """TRR++: rewards relative to their own (role, task) cell of the batch.

        A = (R - mean) / sqrt(variance + 1e-8),   statistics per cell

    Zhao et al. 2025 (Absolute Zero), arXiv:2505.03335, section 3.3.5, Eq. 8 (Task-Relative REINFORCE++); the floor
    of 1e-8 is the published code's. The window of the statistics is the batch, whatever versions it mixes.

    Args:
        rewards: [n] dimensionless.
        lengths: [n] sampled tokens of each rollout.
        cells: [n] which cell each rollout belongs to.
        mode: "sample" counts every rollout once and divides by n (the paper); "token" counts every token once, so
            that long answers weigh more, and divides by tokens - 1 (the published code).

    Returns:
        [n] advantages, the same for each token of a rollout; and the statistics of every cell that occurs. Rollouts
        of a cell whose rewards are all equal get exactly 0.
    """
    reward_n, length_n = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    advantage_n = np.zeros_like(reward_n)
    stats: dict[CellKey, CellStats] = {}
    for cell, members in _members(cells).items():
        weights = length_n[members] if mode == "token" else np.ones(len(members))
        advantage_n[members], stats[cell] = _normalised(reward_n[members], weights, bessel=mode == "token")
    return advantage_n, stats


def token_weights(
    lengths: ArrayLike,
    cells: Sequence[CellKey],
    *,
    aggregation: Literal["token", "sequence"],
    cell_weights: Literal["tokens", "equal"],
    emphasis: Mapping[CellKey, float],
) -> Floats:
    """How much each token of a rollout counts: the loss of a batch is the sum of weight * token loss.

    "token" is the mean over all trained tokens, "sequence" the mean over rollouts of their token means; "equal" takes
    that mean inside each cell and then over the cells, as the published code of arXiv:2505.03335 does. Because the
    counts are those of the whole batch, the loss does not depend on how it is cut into micro-batches and ranks.

    Args:
        lengths: [n] sampled tokens of each rollout, at least 1.
        cells: [n] which cell each rollout belongs to.
        emphasis: factor of a cell, 1 where it is missing; it does not enter the normaliser.

    Returns:
        [n] weight of each single token of each rollout.
    """
    length_n = np.asarray(lengths, np.float64)
    mass_n = length_n if aggregation == "token" else np.ones_like(length_n)
    members_of = _members(cells)
    weight_n = np.zeros_like(length_n)
    for cell, members in members_of.items():
        total = mass_n[members].sum() * len(members_of) if cell_weights == "equal" else mass_n.sum()
        share_n = 1.0 if aggregation == "token" else 1.0 / length_n[members]
        weight_n[members] = emphasis.get(cell, 1.0) * share_n / total
    return weight_n


def shuffled_within_cells(rewards: ArrayLike, cells: Sequence[CellKey], seed: Sequence[int]) -> Floats:
    """The control of every learning claim: the same rewards, handed out at random inside each cell."""
    generator = np.random.default_rng(list(seed))
    reward_n = np.array(rewards, np.float64)
    for members in _members(cells).values():
        reward_n[members] = reward_n[generator.permutation(members)]
    return reward_n


def _normalised(rewards: Floats, weights: Floats, *, bessel: bool) -> tuple[Floats, CellStats]:
    total = weights.sum()
    # Rounding would leave a residue of an all-equal cell, and the division would blow it up.
    if total <= 0 or (rewards == rewards[0]).all():
        return np.zeros_like(rewards), CellStats(count=len(rewards), mean=float(rewards.mean()), std=0.0)
    mean = float((weights * rewards).sum() / total)
    variance = float((weights * (rewards - mean) ** 2).sum() / total)
    if bessel and total > 1:
        variance *= float(total / (total - 1))
    std = float(np.sqrt(variance))
    return (rewards - mean) / np.sqrt(variance + VARIANCE_FLOOR), CellStats(count=len(rewards), mean=mean, std=std)


def _members(cells: Sequence[CellKey]) -> dict[CellKey, NDArray[np.intp]]:
    indices: dict[CellKey, list[int]] = {}
    for index, cell in enumerate(cells):
        indices.setdefault(cell, []).append(index)
    return {cell: np.array(members, np.intp) for cell, members in indices.items()}
