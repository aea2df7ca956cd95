"""From judged attempts to rollouts: a group is whole when its proposal (if any) and all its attempts are judged."""

from collections.abc import Iterator, Sequence

import numpy as np

from azr_async.algorithm.credit import learnability
from azr_async.algorithm.judging import MALFORMED, RIGHT
from azr_async.messages import Challenge, Completion, Judged, Rejected, Role, Rollout, Task


def rollouts_of_group(
    challenge: Challenge, judged: Sequence[Judged], *, proposer_extreme: float, rollout_ids: Iterator[int]
) -> list[Rollout]:
    """The samples of a whole group: the proposer's, rewarded by learnability, and the solver's trained attempts.

    A proposal is rewarded only where all of its attempts could be judged; where none could, there are no samples at
    all. The attempts that are trained on are the first by index,
    not the first to end: short answers end first.
    """
    problem = challenge.problem
    if not judged:
        return []
    if is_too_long(judged):  # a task that nobody can be asked is no valid task
        if challenge.proposal is None:
            return []
        completion = challenge.proposal.completion
        return [_rollout("propose", problem.task, challenge.group_id, completion, MALFORMED, rollout_ids)]
    rollouts = [
        _rollout("solve", problem.task, challenge.group_id, item.attempt.completion, item.reward, rollout_ids)
        for item in sorted(judged, key=lambda item: item.attempt.completion.index)[: challenge.trained_attempts]
    ]
    # A share of the attempts that could be judged would be another number than the one that is rewarded.
    if challenge.proposal is not None and len(judged) == challenge.attempts:
        successes = sum(item.reward == RIGHT for item in judged)
        reward = learnability(successes, len(judged), proposer_extreme)
        completion = challenge.proposal.completion
        rollouts.append(_rollout("propose", problem.task, challenge.group_id, completion, reward, rollout_ids))
    return rollouts


def is_too_long(judged: Sequence[Judged]) -> bool:
    """Did the task's prompt not fit the model's context?"""
    return any(item.attempt.completion.finish == "prompt_too_long" for item in judged)


def rollout_of_rejection(rejected: Rejected, *, rollout_ids: Iterator[int]) -> Rollout:
    """The sample of a proposal that is not a valid task."""
    admission = rejected.proposal.admission
    completion = rejected.proposal.completion
    return _rollout("propose", admission.task, admission.group_id, completion, MALFORMED, rollout_ids)


def _rollout(
    role: Role, task: Task, group_id: int, completion: Completion, reward: float, rollout_ids: Iterator[int]
) -> Rollout:
    prompt = len(completion.prompt_ids)
    return Rollout(
        rollout_id=next(rollout_ids),
        group_id=group_id,
        role=role,
        task=task,
        token_ids=np.concatenate([completion.prompt_ids, completion.token_ids]),
        behavior_logp=np.concatenate([np.zeros(prompt, np.float32), completion.behavior_logp]),
        token_version=np.concatenate([np.full(prompt, -1, np.int32), completion.token_version]),
        reward=reward,
    )
