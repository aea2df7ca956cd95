"""The real graph over the scripted engine and the real sandbox, with a learner written out in the test."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from azr_async.adapters.channels import MemoryReceiver, MemorySender, memory_channel
from azr_async.adapters.engine_client import ScriptedEngine
from azr_async.adapters.journal import SqliteJournal
from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.library import Library
from azr_async.algorithm.values import encode
from azr_async.config import Config, FlowConfig, LibraryConfig, SandboxConfig, SolveConfig
from azr_async.messages import (
    CELLS,
    TASKS,
    BatchRequest,
    Completion,
    EvaluationRequest,
    EvaluationResult,
    GenerateJob,
    Handover,
    Pair,
    Problem,
    RolloutBatch,
    SelfPlayState,
    StateRequest,
    WeightsReady,
)
from azr_async.programs.graph import Reply, Request, self_play
from azr_async.programs.parts import Parts
from azr_async.programs.selfplay import known_standing, left_standing, restored_library

CONFIG = Config(
    flow=FlowConfig(max_lag=1, propose_samples=3, solve_samples=16),
    solve=SolveConfig(attempts=4, trained_attempts=4),
    library=LibraryConfig(seed_tasks=5),
    sandbox=SandboxConfig(workers=2),
)
HELD_OUT = Problem(
    task="deduction",
    program="def f(x):\n    return x + 7",
    pairs=(Pair(input="1", output="8", value=encode(8)),),
)


RESTARTS = (("start", 0), ("resumed", 3), ("again", 3))


def scripted_answer(job: GenerateJob, index: int) -> str:
    """Adds, and solves every other attempt; one proposal in five does not run, and some hit the held-out program."""
    prompt, draw = job.prompt.text, job.seed % 1000
    if prompt.startswith("<propose><induction>"):
        return "".join(f"<in>{draw + step}" for step in range(4)) + "<msg>add"
    if prompt.startswith("<propose>"):
        return f"def f(x):\n    return x + {draw % 40}<in>{draw if draw % 5 else 'y'}"
    if prompt.startswith("<solve><induction>"):
        (given, got), *_ = re.findall(r"<in>(-?\d+)<out>(-?\d+)", prompt) or [("0", "0")]
        return f"def f(x):\n    return x + {int(got) - int(given) + index % 2}"
    added = int((re.findall(r"x \+ (\d+)", prompt) or ["0"])[0])
    given = re.findall(r"(?:<in>|<out>)(-?\d+)", prompt)
    if not given:
        return "'Hello World'"
    sign = 1 if "<deduction>" in prompt else -1
    return str(int(given[0]) + sign * added + index % 2)


class ScriptedLearner:
    """Asks for batches and announces versions, as the learner does; trains nothing."""

    def __init__(self) -> None:
        self.version = 0
        requests: tuple[MemorySender[Request], MemoryReceiver[Request]] = memory_channel(
            "requests", 8, deadline_seconds=20.0
        )
        replies: tuple[MemorySender[Reply], MemoryReceiver[Reply]] = memory_channel("replies", 8, deadline_seconds=20.0)
        self.requests, self.requested = requests
        self.replies, self.replied = replies

    async def start(self, state: str = "", handover: Handover | None = None) -> None:
        if handover is not None:
            await self.requests.send(handover)
        if state:
            await self.requests.send(SelfPlayState(version=self.version, state=state))
        await self.requests.send(WeightsReady(version=self.version))

    async def batch(self) -> RolloutBatch:
        await self.requests.send(BatchRequest(version=self.version))
        reply = await anext(self.replied)
        assert isinstance(reply, RolloutBatch)
        return reply

    async def state(self) -> str:
        await self.requests.send(StateRequest(version=self.version))
        reply = await anext(self.replied)
        assert isinstance(reply, SelfPlayState)
        return reply.state

    async def trained(self) -> None:
        self.version += 1
        await self.requests.send(WeightsReady(version=self.version))


@asynccontextmanager
async def running(
    tmp_path: Path,
    config: Config = CONFIG,
    answer: Callable[[GenerateJob, int], str] = scripted_answer,
    suite: Sequence[Problem] = (HELD_OUT,),
    stop: asyncio.Event | None = None,
    engine: type[ScriptedEngine] = ScriptedEngine,
    version: int = 0,
    state: str = "",
    handover: Handover | None = None,
) -> AsyncIterator[tuple[ScriptedLearner, Parts]]:
    learner = ScriptedLearner()
    learner.version = version
    with SqliteJournal(tmp_path / "journal.sqlite") as journal:
        async with SandboxPool(workers=2, label="test_graph") as sandbox:
            parts = Parts(
                config=config,
                engine=engine(answer, version=lambda: learner.version),
                sandbox=sandbox,
                dialogue=make_dialogue("compact"),
                journal=journal,
                library=Library(capacity=1000, seed=1),
                suite=suite,
                usage=lambda: {"busy.inference": 0.0, "busy.sandbox": sandbox.busy_seconds, "tokens.generated": 0.0},
                gauges=lambda: {"sandbox.forks": 1.0},
                notes={"sandbox.layers.seccomp": "verified"},
                report=lambda phase, done, total: None,
                group_ids=count(-1, -1),
                start_version=version,
            )

            async def begin(version: int, state: str, handover: Handover | None) -> Parts:
                assert version == parts.start_version
                standing = known_standing(config, state, version=version)
                if handover is not None and handover.has_begun:
                    standing = left_standing(config, journal, version=version, incarnation=handover.incarnation)
                if standing is None:
                    return replace(parts, handover=handover)
                library = await restored_library(config, journal, (), version=version, standing=standing)
                return replace(parts, library=library, standing=standing, handover=handover)

            async with asyncio.TaskGroup() as group:
                async with learner.requests:
                    serving = group.create_task(
                        self_play(begin, learner.requested, learner.replies, stop=stop or asyncio.Event())
                    )
                    await learner.start(state, handover)
                    yield learner, parts
                await serving


async def test_every_batch_is_balanced_and_within_its_lag_bound(tmp_path: Path) -> None:
    async with running(tmp_path) as (learner, _):
        for version in range(4):
            batch = await learner.batch()
            assert batch.version == version
            sizes = Counter((rollout.role, rollout.task) for rollout in batch.rollouts)
            assert sizes == {cell: 3 if cell[0] == "propose" else 16 for cell in CELLS}
            assert all(0 <= version - rollout.oldest_version <= 1 for rollout in batch.rollouts)
            await learner.trained()


async def test_no_sample_is_sent_twice(tmp_path: Path) -> None:
    seen: Counter[int] = Counter()
    async with running(tmp_path) as (learner, _):
        for _ in range(3):
            seen.update(rollout.rollout_id for rollout in (await learner.batch()).rollouts)
            await learner.trained()
    assert set(seen.values()) == {1}


async def test_a_resumed_loop_draws_otherwise_than_from_the_start_and_the_same_each_time(tmp_path: Path) -> None:
    async def asked(folder: str, version: int) -> list[tuple[str, int]]:
        jobs: list[tuple[str, int]] = []

        def answer(job: GenerateJob, index: int) -> str:
            jobs.append((job.prompt.text, job.seed))
            return scripted_answer(job, index)

        (tmp_path / folder).mkdir()
        async with running(tmp_path / folder, answer=answer, version=version) as (learner, _):
            assert (await learner.batch()).version == version
            with SqliteJournal(tmp_path / folder / "journal.sqlite") as reader:
                # also the tasks it began with were found with these weights
                assert {found.version for found in reader.tasks()} == {version}
        return jobs

    start, resumed, again = [{seed for _, seed in await asked(name, version)} for name, version in RESTARTS]
    assert not start & resumed
    assert len(resumed & again) > 20


async def test_a_learner_that_ends_before_it_began_ends_self_play(tmp_path: Path) -> None:
    async def never_begin(version: int, state: str, handover: Handover | None) -> Parts:
        raise AssertionError

    learner = ScriptedLearner()
    async with learner.requests:
        pass
    await self_play(never_begin, learner.requested, learner.replies, stop=asyncio.Event())


async def test_what_comes_before_the_first_weights_counts_in_its_newest_form() -> None:
    """The learner may lose self-play's wire between two of them and repeat itself."""
    first, second = (Handover(incarnation=number, has_begun=False) for number in (1, 2))
    begun: list[tuple[str, Handover | None]] = []

    async def begin(version: int, state: str, handover: Handover | None) -> Parts:
        begun.append((state, handover))
        raise TimeoutError

    for sent, expected in (
        ((), ("", None)),
        ((SelfPlayState(version=3, state="a"),), ("a", None)),
        ((SelfPlayState(version=3, state="a"), first, SelfPlayState(version=3, state="b")), ("b", first)),
        ((first, second), ("", second)),
        ((SelfPlayState(version=3, state="a"), first), ("", first)),
    ):
        learner = ScriptedLearner()
        for message in (*sent, WeightsReady(version=3, workers={}, max_lag=1)):
            await learner.requests.send(message)
        with pytest.raises(TimeoutError):
            await self_play(begin, learner.requested, learner.replies, stop=asyncio.Event())
        assert begun.pop() == expected


async def test_rewards_follow_the_judge_and_learnability(tmp_path: Path) -> None:
    async with running(tmp_path) as (learner, _):
        batch = await learner.batch()
    solver = {rollout.reward for rollout in batch.rollouts if rollout.role == "solve"}
    proposer = {rollout.reward for rollout in batch.rollouts if rollout.role == "propose"}
    assert solver == {1.0, -0.5}  # every other attempt is off by one
    assert proposer <= {-1.0, 0.5, 0.0}
    assert 0.5 in proposer  # half of the attempts succeed


async def test_what_is_told_in_words_goes_with_the_first_batch_only(tmp_path: Path) -> None:
    async with running(tmp_path) as (learner, _):
        notes = [dict((await learner.batch()).notes), dict((await learner.batch()).notes)]
    assert notes == [{"sandbox.layers.seccomp": "verified"}, {}]


async def test_a_held_out_program_is_never_learned_from(tmp_path: Path) -> None:
    def answer(job: GenerateJob, index: int) -> str:
        if job.prompt.text.startswith(("<propose><deduction>", "<propose><abduction>")) and job.seed % 2:
            return "def f(x):\n    return x + 7\n<in>5"
        return scripted_answer(job, index)

    async with running(tmp_path, answer=answer) as (learner, parts):
        batch = await learner.batch()
        assert batch.stats["rejected.held_out"] > 0
        assert all("x + 7" not in parts.library.task(task).program for task in TASKS for _ in range(20))


async def test_accepted_tasks_are_on_disk_before_they_are_solved(tmp_path: Path) -> None:
    async with running(tmp_path) as (learner, parts):
        await learner.batch()
        in_library = sum(parts.library.sizes().values())
        with SqliteJournal(tmp_path / "journal.sqlite") as reader:
            assert len(reader.problems()) >= in_library - 2  # the two identity triplets are given, not found


async def test_evaluation_answers_in_the_suites_order(tmp_path: Path) -> None:
    suite = [HELD_OUT, replace(HELD_OUT, pairs=(Pair(input="2", output="3", value=encode(3)),))]
    async with running(tmp_path, suite=suite) as (learner, _):
        await learner.requests.send(EvaluationRequest(version=0))
        reply = await anext(learner.replied)
    assert isinstance(reply, EvaluationResult)
    assert (reply.version, reply.tasks, reply.solved) == (0, ("deduction",) * 2, (True, False))
    assert set(reply.valid) == set(TASKS)
    assert 0.5 < reply.valid["deduction"] < 1.0  # one scripted proposal in five does not run


async def test_stopping_admission_lets_the_work_at_hand_finish(tmp_path: Path) -> None:
    stop = asyncio.Event()
    async with running(tmp_path, stop=stop) as (learner, _):
        await learner.batch()
        stop.set()
        await learner.trained()
        assert len((await learner.batch()).rollouts) == 3 * (3 + 16)  # admitted before, within the window of max_lag 1


async def test_late_samples_are_dropped_counted_and_their_tasks_drawn_again(tmp_path: Path) -> None:
    """With `late = drop` and an engine that answers one prompt only after versions went by."""
    held: list[asyncio.Event] = []

    class SlowEngine(ScriptedEngine):
        async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
            is_held = not held and job.prompt.text.startswith("<solve><deduction>") and job.priority >= 0
            if is_held:
                held.append(asyncio.Event())
            async for completion in super().generate(job):
                if is_held:
                    await held[0].wait()
                yield completion

    config = CONFIG.model_copy(update={"flow": CONFIG.flow.model_copy(update={"late": "drop"})})
    async with running(tmp_path, config, engine=SlowEngine) as (learner, _):
        for _ in range(4):
            await learner.batch()
            await learner.trained()
        held[0].set()
        dropped = 0.0
        while not dropped:
            batch = await learner.batch()
            await learner.trained()
            dropped += batch.stats["samples.dropped"]
            assert all(batch.version - rollout.oldest_version <= 1 for rollout in batch.rollouts)


async def test_a_policy_that_proposes_nothing_valid_still_trains(tmp_path: Path) -> None:
    def answer(job: GenerateJob, index: int) -> str:
        return "nonsense" if job.prompt.text.startswith("<propose>") else scripted_answer(job, index)

    config = CONFIG.model_copy(update={"library": LibraryConfig(seed_tasks=5, seed_proposals=20)})
    async with running(tmp_path, config, answer) as (learner, _):
        batch = await learner.batch()
    sizes = Counter((rollout.role, rollout.task) for rollout in batch.rollouts)
    assert ("solve", "induction") not in sizes  # there is nothing to solve: the cell is excused
    assert len(sizes) == 5
    assert {rollout.reward for rollout in batch.rollouts if rollout.role == "propose"} == {-1.0}
