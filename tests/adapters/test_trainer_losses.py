"""The loss that a step reports is the value of the published formula, computed anew token by token."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.algorithm.losses import Objective
from azr_async.config import Config
from azr_async.messages import Cell, Rollout, RolloutBatch
from tests.algorithm.test_losses import reference_token
from tests.random_models import random_model
from tests.rollout_batches import random_batch

VERSION = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "decoupled ppo, as published for AZR otherwise": {"cell_weights": "equal", "normalise": "token"},
    "masked-is": {"objective": "masked-is", "ratio_floor": 0.7, "ratio_cap": 1.4},
    "cispo, by sequence": {"objective": "cispo", "aggregation": "sequence"},
    "interpolated": {"proximal": "interpolated", "propose_weight": 0.5},
    "equal cells by sequence": {"aggregation": "sequence", "cell_weights": "equal", "propose_weight": 1.0},
    "entropy": {"entropy_weight": 0.02},
    "entropy of equal cells": {"entropy_weight": 0.02, "cell_weights": "equal", "propose_weight": 0.0},
    "reinforce": {"objective": "none", "allow_uncorrected": True},
    "packed": {"layout": "packed", "microbatch_tokens": 64},
    "a budget below every sequence": {"layout": "packed", "microbatch_tokens": 2},
    "a budget below every row": {"layout": "rows", "microbatch_tokens": 2},
}


def normalised(rollouts: list[Rollout], mode: str) -> dict[int, float]:
    """TRR++, arXiv:2505.03335, Eq. 8: reward minus the mean of its cell, over the deviation of its cell."""
    advantages = {}
    for cell in {(rollout.role, rollout.task) for rollout in rollouts}:
        members = [rollout for rollout in rollouts if (rollout.role, rollout.task) == cell]
        counts = [len(r.token_ids) - r.prompt_length if mode == "token" else 1 for r in members]
        seen = np.repeat([rollout.reward for rollout in members], counts)
        spread = np.sqrt(seen.var(ddof=1 if mode == "token" else 0) + 1e-8)
        advantages |= {rollout.rollout_id: (rollout.reward - seen.mean()) / spread for rollout in members}
    return advantages


def mean_of_tokens(losses: dict[int, NDArray[np.float64]], rollouts: list[Rollout], config: Config) -> float:
    """The mean that the settings ask for, of each rollout's token losses."""
    learner = config.learner
    by_cell: dict[Cell, list[NDArray[np.float64]]] = {}
    for rollout in rollouts:
        factor = learner.propose_weight if rollout.role == "propose" else 1.0
        by_cell.setdefault((rollout.role, rollout.task), []).append(factor * losses[rollout.rollout_id])
    groups = list(by_cell.values()) if learner.cell_weights == "equal" else [[x for y in by_cell.values() for x in y]]
    if learner.aggregation == "token":
        return float(np.mean([np.concatenate(group).mean() for group in groups]))
    return float(np.mean([np.mean([one.mean() for one in group]) for group in groups]))


def expected_loss(model: PreTrainedModel, batch: RolloutBatch, config: Config) -> float:
    learner, rollouts = config.learner, list(batch.rollouts)
    advantages = normalised(rollouts, learner.normalise)
    bounds = ("clip_low", "clip_high", "dual_clip", "ratio_cap", "ratio_floor")
    objective = Objective(name=learner.objective, **{name: getattr(learner, name) for name in bounds})
    losses = {}
    for rollout in rollouts:
        with torch.no_grad():
            ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
            logp_TV = model(input_ids=ids[None]).logits[0].double().log_softmax(-1).numpy()
        token_losses = []
        for t in range(rollout.prompt_length, len(rollout.token_ids)):
            theta, mu = logp_TV[t - 1, rollout.token_ids[t]], float(rollout.behavior_logp[t])
            share = 1 - 1 / max(VERSION - int(rollout.token_version[t]), 1)
            proximal = mu + share * (theta - mu) if learner.proximal == "interpolated" else theta
            loss, _ = reference_token(theta, mu, proximal, float(advantages[rollout.rollout_id]), objective)
            entropy = -(np.exp(logp_TV[t - 1]) * logp_TV[t - 1]).sum()
            token_losses.append(loss - learner.entropy_weight * entropy)
        losses[rollout.rollout_id] = np.array(token_losses)
    return mean_of_tokens(losses, rollouts, config)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reported_loss_equals_the_formula_to_1e_6(name: str) -> None:
    config = Config.model_validate({"flow": {"max_lag": 3}, "learner": SETTINGS[name]})
    batch = random_batch(VERSION, lag=3, attempts=2)
    model = random_model("qwen2-tied")
    expected = expected_loss(model, batch, config)
    report = Trainer(model, config, connect_ranks(config), version=VERSION).train(batch)
    assert report.loss == pytest.approx(expected, abs=1e-6)
