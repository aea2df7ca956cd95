"""Admission -> Proposal: draw references, ask the model for a new task, take its answer apart."""

import asyncio

from azr_async.algorithm.jobs import generation_job
from azr_async.algorithm.library import Library
from azr_async.config import ProposeConfig
from azr_async.messages import Admission, Completion, Malformed, Proposal
from azr_async.ports import Dialogue, Engine, Receiver, Sender


async def propose(
    admissions: Receiver[Admission],
    proposals: Sender[Proposal],
    *,
    engine: Engine,
    dialogue: Dialogue,
    library: Library,
    config: ProposeConfig,
    seed: int,
) -> None:
    """Generate one proposal per admission, all of them side by side.

    consumes   admissions, until pacing has closed its end
    produces   proposals; closed on the way out
    waits for  an admission, then the engine, then room in `proposals`
    cancelled  the proposals on the way are forgotten; a Proposal is sent whole or not at all
    """

    async def work(admission: Admission) -> None:
        references = library.references(admission.task, config.references, draw=admission.group_id)
        prompt = dialogue.propose(admission.task, references, pairs=config.induction_pairs)
        job = generation_job(
            "propose",
            admission.group_id,
            prompt,
            samples=1,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            seed=seed,
        )
        async for completion in engine.generate(job):
            draft = (
                dialogue.read_proposal(admission.task, completion.text, references, pairs=config.induction_pairs)
                if completion.finish == "stop"
                else Malformed(reason=_unfinished(completion))
            )
            await proposals.send(
                Proposal(admission=admission, references=references, completion=completion, draft=draft)
            )

    async with proposals, asyncio.TaskGroup() as workers:
        async for admission in admissions:
            workers.create_task(work(admission), name=f"propose-{admission.group_id}")


def _unfinished(completion: Completion) -> str:
    return "no end within max_tokens" if completion.finish == "length" else completion.finish
