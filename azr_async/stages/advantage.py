"""Judged and Rejected -> Rollout: give credit to both roles when a group is whole."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from itertools import count

from azr_async.algorithm.groups import rollout_of_rejection, rollouts_of_group
from azr_async.messages import Challenge, Judged, Rejected, Rollout
from azr_async.ports import Receiver


async def advantage(
    judgements: Receiver[Judged],
    rejections: Receiver[Rejected],
    *,
    on_group: Callable[[Challenge, list[Judged], list[Rollout]], None],
    on_rejected: Callable[[Rejected, list[Rollout]], None],
    proposer_extreme: float,
) -> None:
    """Collect the attempts of each group and turn it into samples, the moment it is whole; leave out the unjudged.

    consumes   judgements and rejections, until their senders have closed
    produces   calls of `on_group` and `on_rejected`, which file the samples for the next batch
    waits for  judgements and rejections only
    cancelled  groups that are not whole are forgotten
    """
    rollout_ids = count()
    judged_by_group: defaultdict[int, list[Judged]] = defaultdict(list)

    async def collect() -> None:
        async for judged in judgements:
            challenge = judged.attempt.challenge
            group = judged_by_group[challenge.group_id]
            group.append(judged)
            if len(group) == challenge.attempts:
                del judged_by_group[challenge.group_id]
                group = [item for item in group if item.is_judged]
                rollouts = rollouts_of_group(
                    challenge, group, proposer_extreme=proposer_extreme, rollout_ids=rollout_ids
                )
                on_group(challenge, group, rollouts)

    async def reject() -> None:
        async for rejected in rejections:
            is_sample = rejected.is_trained and len(rejected.proposal.completion.token_ids) > 0
            rollouts = [rollout_of_rejection(rejected, rollout_ids=rollout_ids)] if is_sample else []
            on_rejected(rejected, rollouts)

    async with asyncio.TaskGroup() as workers:
        workers.create_task(collect(), name="advantage-judgements")
        workers.create_task(reject(), name="advantage-rejections")
