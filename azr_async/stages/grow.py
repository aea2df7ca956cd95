"""An empty library -> a seeded one: the policy at the start proposes until there is enough."""

import asyncio
from collections.abc import Callable, Collection, Iterator

from azr_async.algorithm.library import Library
from azr_async.messages import Admission, Challenge, Rejected, Task
from azr_async.ports import Receiver, Sender


async def grow(
    admissions: Sender[Admission],
    challenges: Receiver[Challenge],
    rejections: Receiver[Rejected],
    *,
    library: Library,
    tasks: Collection[Task],
    target: int,
    proposal_limit: int,
    side_by_side: int,
    group_ids: Iterator[int],
    version: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Keep proposals in the air until each kind has `target` tasks, or `proposal_limit` proposals did not suffice.

    `version` is that of the weights that propose.

    consumes   challenges and rejections: the fate of each proposal
    produces   admissions; closed on the way out, which ends the stages behind
    waits for  the fate of a proposal
    cancelled  nothing is left behind
    """
    flying = dict.fromkeys(tasks, 0)
    started = dict.fromkeys(tasks, 0)
    finished = asyncio.Event()

    async def start_some() -> None:
        for task in tasks:
            missing = target - library.sizes()[task]
            while flying[task] < min(2 * missing, side_by_side) and started[task] < proposal_limit:
                flying[task] += 1
                started[task] += 1
                group_id = next(group_ids)
                await admissions.send(
                    Admission(group_id=group_id, task=task, is_proposal=True, trained_attempts=0, version=version)
                )
        on_progress(sum(min(library.sizes()[task], target) for task in tasks), target * len(tasks))

    def landed(task: Task) -> None:
        flying[task] -= 1

    async def go_on() -> None:
        await start_some()
        if not any(flying.values()):
            finished.set()

    async def valid() -> None:
        async for challenge in challenges:
            landed(challenge.problem.task)
            await go_on()

    async def invalid() -> None:
        async for rejected in rejections:
            landed(rejected.proposal.admission.task)
            await go_on()

    async with asyncio.TaskGroup() as workers, admissions:
        workers.create_task(valid(), name="grow-valid")
        workers.create_task(invalid(), name="grow-invalid")
        await go_on()
        await finished.wait()
