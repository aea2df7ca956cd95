"""Attempt -> Judged: run what was answered in the sandbox and compare outside of it."""

import asyncio

from azr_async.algorithm.judging import (
    INDUCTION_RUNS,
    MALFORMED,
    Judgement,
    judge_abduction,
    judge_deduction,
    judge_induction,
    judged_pairs,
)
from azr_async.messages import Attempt, Completion, Judged, Malformed, Problem
from azr_async.ports import Dialogue, Receiver, Sandbox, Sender


async def verify(
    attempts: Receiver[Attempt],
    judgements: Sender[Judged],
    *,
    sandbox: Sandbox,
    dialogue: Dialogue,
    float_tolerance: float,
) -> None:
    """Judge every attempt, all of them side by side; the sandbox queues what it cannot run yet.

    consumes   attempts, until every solver has closed its end
    produces   judgements; closed on the way out
    waits for  an attempt, then the sandbox, then room in `judgements`
    cancelled  running programs are killed; a Judged is sent whole or not at all
    """

    async def work(attempt: Attempt) -> None:
        judgement = await _judge(attempt.challenge.problem, attempt.completion)
        await judgements.send(Judged(attempt=attempt, **judgement._asdict()))

    async def _judge(problem: Problem, completion: Completion) -> Judgement:
        if completion.finish != "stop":
            return Judgement(MALFORMED, f"no end: {completion.finish}")
        answer = dialogue.read_answer(problem.task, completion.text)
        if isinstance(answer, Malformed):
            return Judgement(MALFORMED, answer.reason)
        match problem.task:
            case "deduction":
                value = await sandbox.literal(answer)
                return judge_deduction(problem, value, relative_tolerance=float_tolerance)
            case "abduction":
                (run,) = await sandbox.run(problem.program, [answer])
                return judge_abduction(problem, run, relative_tolerance=float_tolerance)
            case "induction":
                inputs = [pair.input for pair in judged_pairs(problem)]
                runs = await sandbox.run(answer, inputs, times=INDUCTION_RUNS)
                return judge_induction(problem, runs, relative_tolerance=float_tolerance)

    async with judgements, asyncio.TaskGroup() as workers:
        async for attempt in attempts:
            workers.create_task(work(attempt), name=f"verify-{attempt.completion.job_id}-{attempt.completion.index}")
