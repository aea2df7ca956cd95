"""Batches of random rollouts for the learner's tests."""

import numpy as np

from azr_async.messages import CELLS, Cell, Rollout, RolloutBatch
from tests.random_models import VOCABULARY


def random_rollout(
    rollout_id: int, cell: Cell, version: int, generator: np.random.Generator, *, lag: int = 0, attempts: int = 1
) -> Rollout:
    """A completion of 1 to 9 tokens, some of which are `lag` versions old, to a prompt of 3 to 12 tokens.

    Each `attempts` neighbours have the same prompt.
    """
    group_id = rollout_id // attempts
    prompts = np.random.default_rng([version, group_id])
    prompt_ids = prompts.integers(0, VOCABULARY, int(prompts.integers(3, 13)), dtype=np.int32)
    prompt, completion = len(prompt_ids), int(generator.integers(1, 10))
    role, task = cell
    ages = generator.integers(0, lag + 1, completion)
    ages[0] = lag
    return Rollout(
        rollout_id=rollout_id,
        group_id=group_id,
        role=role,
        task=task,
        token_ids=np.concatenate([prompt_ids, generator.integers(0, VOCABULARY, completion, dtype=np.int32)]),
        behavior_logp=np.concatenate([np.zeros(prompt), generator.normal(-5.5, 0.3, completion)]).astype(np.float32),
        token_version=np.concatenate([np.full(prompt, -1), version - ages]).astype(np.int32),
        reward=float(generator.normal()),
    )


def random_batch(version: int, *, seed: int = 0, per_cell: int = 4, lag: int = 0, attempts: int = 1) -> RolloutBatch:
    """`per_cell` rollouts of each of the six cells, `attempts` at each prompt."""
    generator = np.random.default_rng([seed, version])
    rollouts = [
        random_rollout(index * per_cell + n, cell, version, generator, lag=min(lag, version), attempts=attempts)
        for index, cell in enumerate(CELLS)
        for n in range(per_cell)
    ]
    return RolloutBatch(version=version, rollouts=tuple(rollouts))
