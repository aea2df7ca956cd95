"""From judged attempts to rollouts, and what is counted on the way."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from azr_async.algorithm.groups import rollout_of_rejection, rollouts_of_group
from azr_async.algorithm.library import identity_problem
from azr_async.algorithm.tally import Tally
from azr_async.messages import (
    TASKS,
    Admission,
    Attempt,
    Challenge,
    Completion,
    Finish,
    Judged,
    Malformed,
    Proposal,
    Rejected,
)

ADMISSION = Admission(group_id=5, task="deduction", is_proposal=True, trained_attempts=2, version=3)


def completion(index: int = 0, tokens: int = 3) -> Completion:
    return Completion(
        job_id=11,
        index=index,
        finish="stop",
        text="1",
        prompt_ids=np.arange(4, dtype=np.int32),
        token_ids=np.full(tokens, index, np.int32),
        behavior_logp=np.full(tokens, -0.5, np.float32),
        token_version=np.full(tokens, 3, np.int32),
    )


PROPOSAL = Proposal(admission=ADMISSION, references=(), completion=completion(), draft=Malformed(reason="unused"))


def challenge(*, proposed: bool, trained: int = 2, attempts: int = 4) -> Challenge:
    return Challenge(
        group_id=5,
        problem=identity_problem("deduction"),
        proposal=PROPOSAL if proposed else None,
        attempts=attempts,
        trained_attempts=trained,
    )


def judged(of: Challenge, rewards: list[float], finish: Finish = "stop") -> list[Judged]:
    attempts = [
        Attempt(challenge=of, completion=replace(completion(index), finish=finish)) for index in range(len(rewards))
    ]
    return [
        Judged(attempt=attempt, reward=reward, reason="") for attempt, reward in zip(attempts, rewards, strict=True)
    ]


@pytest.mark.parametrize(
    ("rewards", "extreme", "proposer"),
    [
        ([1.0, -0.5, -0.5, -1.0], 0.0, 0.75),
        ([1.0, 1.0, 1.0, -1.0], 0.0, 0.25),
        ([1.0, 1.0, 1.0, 1.0], 0.0, 0.0),
        ([-1.0, -0.5, -0.5, -0.5], -0.5, -0.5),
    ],
)
def test_the_proposer_earns_one_minus_the_success_of_all_attempts(
    rewards: list[float], extreme: float, proposer: float
) -> None:
    group = challenge(proposed=True)
    rollouts = rollouts_of_group(group, judged(group, rewards), proposer_extreme=extreme, rollout_ids=count())
    assert [rollout.reward for rollout in rollouts if rollout.role == "propose"] == [proposer]


def test_the_trained_attempts_are_the_first_by_index_not_the_first_to_end() -> None:
    group = challenge(proposed=False)
    late_first = list(reversed(judged(group, [0.1, 0.2, 0.3, 0.4])))
    rollouts = rollouts_of_group(group, late_first, proposer_extreme=0.0, rollout_ids=count())
    assert [rollout.reward for rollout in rollouts] == [0.1, 0.2]


def test_a_rollout_is_the_prompt_and_the_completion_with_versions_on_the_latter() -> None:
    rollout = rollout_of_rejection(Rejected(proposal=PROPOSAL, reason="error"), rollout_ids=count(7))
    assert rollout.rollout_id == 7
    assert rollout.reward == -1.0
    assert rollout.token_version.tolist() == [-1, -1, -1, -1, 3, 3, 3]
    assert (rollout.prompt_length, rollout.oldest_version) == (4, 3)


@pytest.mark.parametrize(("proposed", "rewards"), [(True, [-1.0]), (False, [])])
def test_a_task_that_does_not_fit_the_context_is_not_valid_and_has_no_attempts(
    proposed: bool, rewards: list[float]
) -> None:
    group = challenge(proposed=proposed)
    judgements = judged(group, [-1.0] * 4, finish="prompt_too_long")
    rollouts = rollouts_of_group(group, judgements, proposer_extreme=0.0, rollout_ids=count())
    assert [(rollout.role, rollout.reward) for rollout in rollouts] == [("propose", reward) for reward in rewards]


def test_rates_are_over_what_was_proposed_since_the_last_time() -> None:
    tally, group = Tally(TASKS), challenge(proposed=True)
    tally.group(group, judged(group, [1.0, -0.5, -0.5, -0.5]))
    tally.rejected(Rejected(proposal=PROPOSAL, reason="timeout"))
    tally.rejected(Rejected(proposal=PROPOSAL, reason="held_out", is_trained=False))
    metrics = tally.take()
    assert metrics["valid_rate.deduction"] == 0.5
    assert metrics["solve_rate.deduction"] == 0.25
    assert metrics["learnable_rate.deduction"] == 1.0
    assert metrics["rejected.timeout"] == metrics["rejected.held_out"] == 1.0
    assert "valid_rate.abduction" not in metrics
    assert set(tally.take().values()) == {0.0}


def test_a_group_with_lost_attempts_says_nothing_about_how_learnable_tasks_are() -> None:
    tally, group = Tally(TASKS), challenge(proposed=True)
    tally.group(group, judged(group, [1.0, -0.5, -0.5, -0.5]))
    tally.group(group, judged(group, [1.0, 1.0, 1.0]))
    metrics = tally.take()
    assert metrics["learnable_rate.deduction"] == metrics["valid_rate.deduction"] == 1.0


def test_dropped_samples_are_counted_by_cell_and_length() -> None:
    tally, group = Tally(TASKS), challenge(proposed=False)
    tally.dropped(rollouts_of_group(group, judged(group, [1.0] * 4), proposer_extreme=0.0, rollout_ids=count()))
    metrics = tally.take()
    assert metrics["samples.dropped"] == metrics["dropped.solve_deduction"] == metrics["dropped.reward_sum"] == 2.0
    assert metrics["tokens.dropped"] == 6.0
