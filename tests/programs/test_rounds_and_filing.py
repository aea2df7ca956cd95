"""Evaluation keeps nothing and is greedy; dropped tasks are drawn again; what fits no prompt is let go."""

from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from azr_async.adapters.engine_client import ScriptedEngine
from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.ledger import Ledger
from azr_async.algorithm.library import Library, identity_problem
from azr_async.algorithm.staleness import Flow
from azr_async.algorithm.values import encode
from azr_async.config import Config, EvaluationConfig
from azr_async.errors import ConfigError
from azr_async.messages import (
    TASKS,
    Attempt,
    Challenge,
    Completion,
    Finish,
    GenerateJob,
    Judged,
    Malformed,
    Pair,
    Problem,
    Proposal,
    Rollout,
)
from azr_async.programs.filing import Filing
from azr_async.programs.parts import Parts
from azr_async.programs.rounds import evaluate, evaluate_proposer
from tests.completions import a_completion

PROBLEM = Problem(
    task="deduction", program="def f(x):\n    return x + 7", pairs=(Pair(input="1", output="8", value=encode(8)),)
)


class RecordingEngine(ScriptedEngine):
    """The scripted engine, and what it was asked."""

    jobs: list[GenerateJob]

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        self.jobs.append(job)
        async for completion in super().generate(job):
            yield completion


def answer(job: GenerateJob, index: int) -> str:
    return "def f(x):\n    return x + 1<in>3" if job.prompt.text.startswith("<propose>") else "8"


async def test_evaluation_is_greedy_and_keeps_nothing_it_saw(tmp_path: Path) -> None:
    engine = RecordingEngine(answer)
    engine.jobs = []
    library = Library(capacity=9, seed=0)
    before = library.sizes()
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        async with SandboxPool(workers=1, label="test_rounds") as sandbox:
            parts = Parts(
                config=Config(evaluation=EvaluationConfig(proposals=2)),
                engine=engine,
                sandbox=sandbox,
                dialogue=make_dialogue("compact"),
                journal=journal,
                library=library,
                suite=[PROBLEM],
                usage=dict,
                gauges=dict,
                report=lambda phase, done, total: None,
                group_ids=count(-1, -1),
                start_version=0,
            )
            assert await evaluate(parts) == (True,)
            assert [job.temperature for job in engine.jobs] == [0.0]
            valid = await evaluate_proposer(parts)
        assert valid == {"deduction": 1.0, "abduction": 1.0, "induction": 0.0}
        assert journal.problems() == []
    assert library.sizes() == before


def rollout(group_id: int) -> Rollout:
    return Rollout(
        rollout_id=group_id,
        group_id=group_id,
        role="solve",
        task="deduction",
        token_ids=np.zeros(2, np.int32),
        behavior_logp=np.zeros(2, np.float32),
        token_version=np.array([-1, 0], np.int32),
        reward=1.0,
    )


def filing(library: Library, ledger: Ledger | None = None) -> tuple[Filing, Flow]:
    flow = Flow(max_lag=1, propose_samples=1, solve_samples=1, trained_attempts=1, tasks=TASKS)
    ledger = Ledger() if ledger is None else ledger
    made = Filing(flow, library, ledger, tasks=TASKS, usage=dict, gauges=dict, widths=dict, on_change=lambda: None)
    return made, flow


def judged(problem: Problem, group_id: int, finish: Finish = "stop") -> tuple[Challenge, list[Judged]]:
    challenge = Challenge(group_id=group_id, problem=problem, proposal=None, attempts=1, trained_attempts=1)
    completion = a_completion(finish=finish)
    return challenge, [Judged(attempt=Attempt(challenge=challenge, completion=completion), reward=1.0, reason="")]


def test_the_task_of_a_dropped_sample_is_drawn_next() -> None:
    library = Library(capacity=99, seed=0)
    for number in range(30):
        library.add(replace(PROBLEM, program=f"def f(x):\n    return x - {number}"))
    library.add(PROBLEM)
    desk, flow = filing(library)
    admission = next(a for _ in range(9) if (a := flow.admit(())) is not None and a.task == "deduction")
    desk.admitted(admission)
    desk.group(*judged(PROBLEM, admission.group_id), [rollout(admission.group_id)])
    desk.dropped([rollout(admission.group_id)])
    assert library.task("deduction") == PROBLEM
    assert desk.stats()["samples.dropped"] == 1.0


def test_samples_that_the_sandbox_could_not_judge_are_dropped_and_their_slots_free() -> None:
    library, ledger = Library(capacity=99, seed=0), Ledger()
    desk, flow = filing(library, ledger)
    empty = flow.alive()
    admission = flow.admit(())
    assert admission is not None
    desk.admitted(admission)
    assert flow.alive() != empty
    proposal = Proposal(admission=admission, references=(), completion=a_completion(), draft=Malformed(reason="unused"))
    problem = replace(PROBLEM, task=admission.task)
    desk.group(
        Challenge(group_id=admission.group_id, problem=problem, proposal=proposal, attempts=2, trained_attempts=1),
        [],
        [],
    )
    samples = ledger.take().samples
    assert {sample.role for sample in samples} == {"propose", "solve"}
    fates = {(entry.stage, entry.reason) for entry in samples.values()}
    assert fates == {("dropped", "the sandbox could not judge it")}
    assert flow.alive() == empty


def test_a_task_that_fits_no_prompt_is_let_go() -> None:
    library = Library(capacity=99, seed=0)
    library.add(PROBLEM)
    desk, _ = filing(library)
    desk.group(*judged(PROBLEM, 0, "prompt_too_long"), [])
    assert library.sizes()["deduction"] == 1


def test_a_context_too_short_for_the_first_task_is_told() -> None:
    desk, _ = filing(Library(capacity=99, seed=0))
    with pytest.raises(ConfigError, match=r"Raise engine\.context_tokens"):
        desk.group(*judged(identity_problem("deduction"), 0, "prompt_too_long"), [])
