"""Challenge -> Attempt: ask the current policy for several answers to one task."""

import asyncio

from azr_async.algorithm.jobs import generation_job
from azr_async.config import SolveConfig
from azr_async.messages import Attempt, Challenge
from azr_async.ports import Dialogue, Engine, Receiver, Sender


async def solve(
    challenges: Receiver[Challenge],
    attempts: Sender[Attempt],
    *,
    engine: Engine,
    dialogue: Dialogue,
    config: SolveConfig,
    seed: int,
) -> None:
    """Generate every attempt at every challenge; each goes on as soon as it ends, not when its group does.

    consumes   challenges, until every sender has closed its end
    produces   attempts; closed on the way out
    waits for  a challenge, then the engine, then room in `attempts`
    cancelled  attempts on the way are forgotten; an Attempt is sent whole or not at all
    """

    async def work(challenge: Challenge) -> None:
        prompt = dialogue.solve(challenge.problem)
        job = generation_job(
            "solve",
            challenge.group_id,
            prompt,
            samples=challenge.attempts,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            seed=seed,
        )
        async for completion in engine.generate(job):
            await attempts.send(Attempt(challenge=challenge, completion=completion))

    async with attempts, asyncio.TaskGroup() as workers:
        async for challenge in challenges:
            workers.create_task(work(challenge), name=f"solve-{challenge.group_id}")
