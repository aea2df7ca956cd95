"""Proposal -> Challenge: keep the programs that run, return an answerable value and answer the same twice."""

import asyncio
from collections.abc import Collection

from azr_async.algorithm.library import Library
from azr_async.algorithm.validity import problem_from
from azr_async.config import ProposeConfig
from azr_async.messages import Challenge, Draft, Malformed, Problem, Proposal, Rejected
from azr_async.ports import Journal, Receiver, Sandbox, Sender


async def validate(
    proposals: Receiver[Proposal],
    challenges: Sender[Challenge],
    rejections: Sender[Rejected],
    *,
    sandbox: Sandbox,
    library: Library,
    journal: Journal,
    config: ProposeConfig,
    attempts: int,
    held_out_programs: Collection[str],
) -> None:
    """Run what was proposed; valid tasks enter the library and the journal, then go on to be solved.

    consumes   proposals, until the proposers have closed their end
    produces   challenges (valid) and rejections (not); both closed on the way out
    waits for  a proposal, then the sandbox, then room in a channel (that is the backpressure)
    cancelled  running programs are killed; a message is sent whole or not at all
    """

    async def work(proposal: Proposal) -> None:
        verdict = await _problem_or_reason(proposal)
        if isinstance(verdict, str):
            is_trained = verdict not in ("held_out", "prompt_too_long", "lost")
            await rejections.send(Rejected(proposal=proposal, reason=verdict, is_trained=is_trained))
            return
        admission = proposal.admission
        if library.add(verdict, group_id=admission.group_id):
            await journal.add(
                verdict, version=admission.version, group_id=admission.group_id, parents=proposal.references
            )
        await challenges.send(
            Challenge(
                group_id=admission.group_id,
                problem=verdict,
                proposal=proposal,
                attempts=attempts,
                trained_attempts=admission.trained_attempts,
            )
        )

    async def _problem_or_reason(proposal: Proposal) -> Problem | str:
        match proposal.draft:
            case Malformed():
                return "prompt_too_long" if proposal.completion.finish == "prompt_too_long" else "malformed"
            case Draft() as draft:
                outcomes = await sandbox.run(draft.program, draft.inputs, times=config.determinism_runs)
                return problem_from(
                    draft,
                    outcomes,
                    text_limit=config.text_limit,
                    every_pair=config.every_pair,
                    held_out_programs=held_out_programs,
                )

    async with challenges, rejections, asyncio.TaskGroup() as workers:
        async for proposal in proposals:
            workers.create_task(work(proposal), name=f"validate-{proposal.admission.group_id}")
