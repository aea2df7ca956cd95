"""Engines as self-play sees them: one contract for all, then what is special about remote ones."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr_async.adapters.channels import (
    MemoryReceiver,
    MemorySender,
    ZmqReceiver,
    ZmqSender,
    memory_channel,
    zmq_receiver,
    zmq_sender,
)
from azr_async.adapters.engine_client import RemoteEngines, ScriptedEngine
from azr_async.errors import EngineError
from azr_async.messages import CancelJob, Completion, GenerateJob, GenerationResults, Prompt, WorkerReady
from azr_async.ports import Engine

Answer = WorkerReady | GenerationResults
Order = GenerateJob | CancelJob
OpenEngine = Callable[..., AbstractAsyncContextManager[Engine]]


def job(job_id: int, *, samples: int = 1, priority: int = 0, max_tokens: int = 100) -> GenerateJob:
    return GenerateJob(
        job_id=job_id,
        prompt=Prompt(text=f"prompt {job_id}"),
        samples=samples,
        priority=priority,
        temperature=1.0,
        top_p=1.0,
        max_tokens=max_tokens,
        seed=0,
    )


def rule(asked: GenerateJob, index: int) -> str:
    return f"{asked.prompt.text}, answer {index}: é"


# ---------------------------------------------------------------- the contract


async def serve(name: str, folder: Path, engine: Engine) -> None:
    """An inference worker as far as its channels go."""
    answers: ZmqSender[Answer] = zmq_sender(f"ipc://{folder}/answers", name=name, peer="selfplay")
    tokens = 0

    async def generate(asked: GenerateJob) -> None:
        nonlocal tokens
        async for completion in engine.generate(asked):
            tokens += len(completion.token_ids)
            await answers.send(
                GenerationResults(worker=name, completions=(completion,), busy_seconds=1.5, generated_tokens=tokens)
            )

    orders: ZmqReceiver[Order] = zmq_receiver(f"ipc://{folder}/{name}", (GenerateJob, CancelJob), name=name, capacity=8)
    async with answers, asyncio.TaskGroup() as tasks, orders:
        await answers.send(WorkerReady(worker=name, endpoint=orders.endpoint, slots=2))
        async for order in orders:
            if isinstance(order, GenerateJob):
                tasks.create_task(generate(order))


@asynccontextmanager
async def remote_engines(folder: Path, engine: Engine, *names: str) -> AsyncIterator[RemoteEngines]:
    """Real channels to workers with `engine`."""
    answers: ZmqReceiver[Answer] = zmq_receiver(
        f"ipc://{folder}/answers", (WorkerReady, GenerationResults), name="answers", capacity=8
    )

    connected = asyncio.Semaphore(0)

    def connect(ready: WorkerReady) -> ZmqSender[Order]:
        connected.release()
        return zmq_sender(ready.endpoint, name="selfplay", peer=ready.worker)

    async with answers, asyncio.TaskGroup() as tasks:
        engines = RemoteEngines(answers, connect, expected_workers=names, ready_seconds=10.0, job_seconds=10.0)
        engines.installed(dict.fromkeys(names, 0))
        running = tasks.create_task(engines.run())
        for name in names:
            tasks.create_task(serve(name, folder, engine))
        yield engines
        for _ in names:
            await connected.acquire()
        engines.stop()
        await running
        assert [left async for left in answers if isinstance(left, WorkerReady)] == []


@pytest.fixture(params=["scripted", "remote"])
def open_engine(request: pytest.FixtureRequest, tmp_path: Path) -> OpenEngine:
    """The same scripted answers, from here or from two workers behind channels."""

    @asynccontextmanager
    async def scripted(version: Callable[[], int] = lambda: 0) -> AsyncIterator[Engine]:
        yield ScriptedEngine(rule, version=version)

    @asynccontextmanager
    async def remote(version: Callable[[], int] = lambda: 0) -> AsyncIterator[Engine]:
        async with remote_engines(tmp_path, ScriptedEngine(rule, version=version), "worker-0", "worker-1") as engines:
            yield engines

    return scripted if request.param == "scripted" else remote


async def collect(engine: Engine, asked: GenerateJob) -> list[Completion]:
    return [completion async for completion in engine.generate(asked)]


async def test_a_job_gives_each_of_its_samples_once(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        completions = await collect(engine, job(7, samples=5))
    assert [(completion.job_id, completion.index) for completion in completions] == [(7, n) for n in range(5)]
    assert [completion.text for completion in completions] == [rule(job(7), n) for n in range(5)]
    assert {completion.finish for completion in completions} == {"stop"}


async def test_tokens_logps_and_versions_belong_together(open_engine: OpenEngine) -> None:
    async with open_engine(version=lambda: 3) as engine:
        [completion] = await collect(engine, job(1))
    *tokens, end = completion.token_ids
    assert bytes(tokens).decode() == completion.text
    assert end == ScriptedEngine.END_OF_SEQUENCE
    assert bytes(completion.prompt_ids.tolist()).decode() == "prompt 1"
    assert set(completion.token_version.tolist()) == {3}
    assert completion.behavior_logp.dtype == np.float32
    assert (completion.behavior_logp < 0).all()


async def test_an_answer_is_cut_at_its_length_limit(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        [completion] = await collect(engine, job(1, max_tokens=6))
    assert (completion.finish, completion.text, len(completion.token_ids)) == ("length", "prompt", 6)


async def test_many_jobs_run_side_by_side(open_engine: OpenEngine) -> None:
    async with open_engine() as engine, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(collect(engine, job(n, samples=3))) for n in range(20)]
        found = [[completion.text for completion in await task] for task in running]
    assert found == [[rule(job(n), index) for index in range(3)] for n in range(20)]


async def test_leaving_a_job_early_leaves_the_others_alone(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        async with aclosing(engine.generate(job(1, samples=5))) as completions:  # type: ignore[type-var]
            assert (await anext(completions)).index == 0
        assert len(await collect(engine, job(2, samples=5))) == 5


# ---------------------------------------------------------------- remote engines, with the workers' part played here


class Stage:
    """Remote engines between memory channels. What they send to a worker ends up in `sent`."""

    def __init__(self, *, oversubscription: float = 1.0, ready_seconds: float = 5.0, job_seconds: float = 5.0) -> None:
        ends: tuple[MemorySender[Answer], MemoryReceiver[Answer]]
        ends = memory_channel("answers", 100, deadline_seconds=None)
        self.worker_side, answers = ends
        self.sent: dict[str, MemoryReceiver[Order]] = {}
        self.engines = RemoteEngines(
            answers,
            self.connect,
            expected_workers=["a", "b"],
            ready_seconds=ready_seconds,
            job_seconds=job_seconds,
            oversubscription=oversubscription,
        )
        self.engines.installed({"a": 0, "b": 0})

    def connect(self, ready: WorkerReady) -> MemorySender[Order]:
        ends: tuple[MemorySender[Order], MemoryReceiver[Order]]
        ends = memory_channel(ready.worker, 100, deadline_seconds=None)
        self.sent[ready.worker] = ends[1]
        return ends[0]

    async def announce(self, worker: str, slots: int, incarnation: int = 0) -> None:
        await self.worker_side.send(WorkerReady(worker=worker, endpoint="", slots=slots, incarnation=incarnation))
        await settled()

    async def answer(self, worker: str, job_id: int, *indices: int, tokens: int = 0) -> None:
        scripted = ScriptedEngine(rule)
        completions = [completion async for completion in scripted.generate(job(job_id, samples=max(indices) + 1))]
        results = GenerationResults(
            worker=worker,
            completions=tuple(completions[index] for index in indices),
            busy_seconds=tokens / 100,
            generated_tokens=tokens,
        )
        await self.worker_side.send(results)
        await settled()

    async def orders(self, worker: str) -> list[Order]:
        """What the worker has got since the last look."""
        orders = []
        try:
            async with asyncio.timeout(0.02):
                async for order in self.sent[worker]:
                    orders.append(order)  # noqa: PERF401  those before the timeout are to stay
        except TimeoutError:
            pass
        return orders

    async def received(self, worker: str) -> list[int]:
        """Ids of the jobs that the worker has got since the last look."""
        return [order.job_id for order in await self.orders(worker) if isinstance(order, GenerateJob)]

    async def lose(self, worker: str) -> None:
        """The worker's end of its channel is gone."""
        await self.sent[worker].__aexit__()
        await settled()


async def settled() -> None:
    """Let everybody who can do something do it."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def on_stage(stage: Stage) -> AsyncIterator[asyncio.TaskGroup]:
    """The engines are running; what the body starts ends with it."""
    async with asyncio.TaskGroup() as tasks, asyncio.TaskGroup() as jobs:
        tasks.create_task(stage.engines.run())
        yield jobs
        stage.engines.stop()


async def collected(engine: Engine, asked: GenerateJob) -> list[Completion] | EngineError:
    try:
        return await collect(engine, asked)
    except EngineError as error:
        return error


async def test_the_most_urgent_job_goes_first_and_ties_go_by_id() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        for job_id, priority in [(1, 5), (2, 1), (3, 3), (4, 1)]:
            tasks.create_task(collected(stage.engines, job(job_id, priority=priority)))
        await settled()
        await stage.announce("a", slots=1)
        order = await stage.received("a")
        for _ in range(3):
            await stage.answer("a", order[-1], 0)
            order += await stage.received("a")
    assert order == [2, 4, 3, 1]


async def test_a_job_goes_to_the_worker_with_the_most_room() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=2)
        await stage.announce("b", slots=6)
        for job_id in range(4):
            tasks.create_task(collected(stage.engines, job(job_id, samples=2)))
        await settled()
        assert await stage.received("a") == [2]
        assert await stage.received("b") == [0, 1, 3]


@given(slots=st.integers(1, 8), percent=st.integers(100, 300), samples=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_a_worker_has_work_up_to_its_slots_times_the_oversubscription(slots: int, percent: int, samples: int) -> None:
    async def jobs_under_way() -> int:
        stage = Stage(oversubscription=percent / 100)
        async with on_stage(stage) as tasks:
            for job_id in range(30):
                tasks.create_task(collected(stage.engines, job(job_id, samples=samples)))
            await stage.announce("a", slots=slots)
            return len(await stage.received("a"))

    limit = slots * percent / 100
    under_way = asyncio.run(jobs_under_way()) * samples
    assert limit <= under_way < limit + samples


async def test_a_sample_that_comes_back_makes_room_for_the_next_job() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=2)
        for job_id in range(3):
            tasks.create_task(collected(stage.engines, job(job_id, samples=2)))
        await settled()
        assert await stage.received("a") == [0]
        await stage.answer("a", 0, 1)
        assert await stage.received("a") == [1]
        await stage.answer("a", 0, 0)
        assert await stage.received("a") == []
        await stage.answer("a", 1, 0)
        assert await stage.received("a") == [2]


async def test_a_job_that_was_left_is_cancelled_and_its_results_are_counted() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=2)
        leaving = tasks.create_task(collected(stage.engines, job(1, samples=3)))
        await settled()
        leaving.cancel()
        await settled()
        assert (await stage.orders("a"))[1:] == [CancelJob(job_id=1)]
        await stage.answer("a", 1, 0, 2)
        assert stage.engines.numbers()["late"] == 2
        await stage.answer("a", 1, 1)
        assert stage.engines.numbers()["late"] == 3
        assert stage.engines.numbers()["unknown"] == 0


async def test_a_job_that_was_left_before_its_turn_is_never_sent() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        leaving = tasks.create_task(collected(stage.engines, job(1)))
        tasks.create_task(collected(stage.engines, job(2)))
        await settled()
        leaving.cancel()
        await stage.announce("a", slots=2)
        assert await stage.received("a") == [2]


async def test_results_nobody_asked_for_or_twice_are_counted_and_harm_nothing() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=2)
        asked = tasks.create_task(collected(stage.engines, job(1, samples=2)))
        await settled()
        await stage.answer("a", 99, 0)
        await stage.answer("a", 1, 0, 0)
        await stage.answer("a", 1, 2)
        await stage.answer("a", 1, 1)
        completions = await asked
        assert isinstance(completions, list)
        assert [completion.index for completion in completions] == [0, 1]
        assert stage.engines.numbers()["unknown"] == 3


async def test_a_workers_running_totals_are_kept() -> None:
    stage = Stage()
    async with on_stage(stage):
        await stage.announce("a", slots=2)
        await stage.announce("b", slots=2)
        await stage.answer("a", 99, 0, tokens=100)
        await stage.answer("a", 99, 0, tokens=250)
        await stage.answer("b", 99, 0, tokens=10)
        totals = {name: (total.busy_seconds, total.generated_tokens) for name, total in stage.engines.totals.items()}
        assert totals == {"a": (2.5, 250), "b": (0.1, 10)}


async def test_a_job_that_takes_too_long_ends_with_the_name_of_its_worker() -> None:
    stage = Stage(job_seconds=0.05)
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=8)
        late = tasks.create_task(collected(stage.engines, job(41, samples=3)))
        await settled()
        await stage.answer("a", 41, 1)
        error = await late
        assert "inference worker a is too slow" in str(error)
        assert "of its 1 open jobs has been there for 0.05 s, and 2 samples of it are missing" in str(error)
        assert "wires.step_seconds" in str(error)
        prompt = tasks.create_task(collected(stage.engines, job(42)))
        await settled()
        await stage.answer("a", 42, 0)
        assert isinstance(await prompt, list)


async def test_the_open_jobs_of_the_only_worker_end_with_the_same_words_when_it_is_too_slow() -> None:
    stage = Stage(job_seconds=0.05)
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=20)
        slow = [tasks.create_task(collected(stage.engines, job(n))) for n in range(15)]
        words = {str(await task) for task in slow}
    assert len(words) == 1
    assert "the oldest of its 15 open jobs" in words.pop()


async def test_what_a_worker_does_not_make_in_time_is_taken_from_it_and_made_by_another() -> None:
    stage = Stage(job_seconds=0.4)
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=20)
        slow = [tasks.create_task(collected(stage.engines, job(n))) for n in range(2)]
        await settled()
        await stage.announce("b", slots=20)
        while not (taken := [order for order in await stage.orders("b") if isinstance(order, GenerateJob)]):
            pass
        assert [order.job_id for order in taken] == [0, 1]
        assert (await stage.orders("a"))[2:] == [CancelJob(job_id=0), CancelJob(job_id=1)]
        later = tasks.create_task(collected(stage.engines, job(2)))
        assert await stage.received("a") == []
        await stage.answer("a", 0, 0)
        assert stage.engines.numbers()["late"] == 1
        for job_id in (0, 1, 2):
            await stage.answer("b", job_id, 0)
        assert [isinstance(await task, list) for task in (*slow, later)] == [True, True, True]


# ---------------------------------------------------------------- workers come and go


async def test_only_the_missing_samples_of_a_lost_worker_are_made_again() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=4)
        asked = tasks.create_task(collected(stage.engines, job(1, samples=4)))
        await settled()
        await stage.answer("a", 1, 0, 2)
        await stage.announce("b", slots=2)
        await stage.lose("a")
        assert await stage.orders("b") == [replace(job(1, samples=4), indices=(1, 3))]
        await stage.answer("a", 1, 1)
        await stage.answer("b", 1, 1, 3)
        completions = await asked
        assert isinstance(completions, list)
        assert sorted(completion.index for completion in completions) == [0, 1, 2, 3]
        assert stage.engines.numbers() == {"workers": 1, "lost_workers": 1, "reissued": 2, "late": 1, "unknown": 0}


async def test_a_worker_without_the_newest_weights_gets_no_jobs_until_it_is_named() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=1, incarnation=7)
        asked = tasks.create_task(collected(stage.engines, job(1)))
        assert await stage.received("a") == []
        stage.engines.installed({"a": 7})
        assert await stage.received("a") == [1]
        await stage.answer("a", 1, 0)
        assert isinstance(await asked, list)


async def test_a_worker_that_new_weights_have_not_reached_loses_what_it_had() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=1)
        asked = tasks.create_task(collected(stage.engines, job(1)))
        assert await stage.received("a") == [1]
        await stage.announce("b", slots=1)
        stage.engines.installed({"b": 0})
        assert await stage.orders("a") == [CancelJob(job_id=1)]
        assert await stage.received("b") == [1]
        await stage.answer("b", 1, 0)
        assert isinstance(await asked, list)


async def test_a_worker_that_was_started_again_replaces_the_one_of_its_name_and_its_totals_go_on() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=1)
        asked = tasks.create_task(collected(stage.engines, job(1)))
        await settled()
        await stage.answer("a", 99, 0, tokens=100)
        await stage.announce("a", slots=1, incarnation=2)
        assert await stage.received("a") == []
        stage.engines.installed({"a": 2})
        assert await stage.received("a") == [1]
        await stage.answer("a", 1, 0, tokens=5)
        assert isinstance(await asked, list)
        assert stage.engines.totals["a"].generated_tokens == 105


async def test_when_all_are_lost_somebody_may_still_come_back_in_time() -> None:
    stage = Stage(ready_seconds=0.2)
    async with on_stage(stage) as tasks:
        await stage.announce("a", slots=1)
        asked = tasks.create_task(collected(stage.engines, job(1)))
        await settled()
        await stage.lose("a")
        await asyncio.wait([asked], timeout=0.1)
        await stage.announce("b", slots=1)
        await asyncio.wait([asked], timeout=0.2)
        await stage.answer("b", 1, 0)
        assert isinstance(await asked, list)


async def test_when_nobody_comes_back_the_run_ends_with_their_names() -> None:
    stage = Stage(ready_seconds=0.05)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run_error(stage.engines))
        await stage.announce("a", slots=1)
        await stage.lose("a")
        assert "all of a, b were lost, and none came back within 0.05 s" in await running


async def test_workers_that_do_not_come_up_are_named() -> None:
    stage = Stage(ready_seconds=0.05)
    with pytest.RaisesGroup(pytest.RaisesExc(EngineError, match=r"after 0\.05 s: a, b did not come up")):
        await stage.engines.run()


async def test_one_worker_is_enough_to_begin() -> None:
    stage = Stage(ready_seconds=0.05)
    async with on_stage(stage) as tasks:
        await stage.announce("b", slots=1)
        slow = tasks.create_task(collected(stage.engines, job(1)))
        assert await stage.received("b") == [1]
        await asyncio.wait([slow], timeout=0.1)
        await stage.answer("b", 1, 0)
        assert isinstance(await slow, list)


async def test_stopping_ends_open_jobs_and_closes_the_ways_to_the_workers() -> None:
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(stage.engines.run())
        await stage.announce("a", slots=1)
        waiting = [tasks.create_task(collected(stage.engines, job(n))) for n in range(3)]
        await settled()
        stage.engines.stop()
        await running
        assert [str(await task)[:14] for task in waiting] == ["job 0 was open", "job 1 was open", "job 2 was open"]
        assert [asked.job_id async for asked in stage.sent["a"]] == [0]
        assert "after the engines had stopped" in str(await collected(stage.engines, job(9)))


async def test_workers_that_close_with_jobs_open_are_an_error() -> None:
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run_error(stage.engines))
        await stage.announce("a", slots=1)
        waiting = tasks.create_task(collected(stage.engines, job(1)))
        await settled()
        await stage.worker_side.__aexit__()
        assert "every inference worker has closed, but 1 jobs are open" in await running
        assert isinstance(await waiting, EngineError)


async def test_workers_that_close_when_all_is_done_end_it() -> None:
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(stage.engines.run())
        await stage.announce("a", slots=1)
        await stage.worker_side.__aexit__()
        await running


async def run_error(engines: RemoteEngines) -> str:
    with pytest.RaisesGroup(EngineError) as errors:
        await engines.run()
    return str(errors.value.exceptions[0])


async def test_jobs_that_cannot_be_told_apart_or_ask_for_nothing_are_refused() -> None:
    stage = Stage()
    async with on_stage(stage) as tasks:
        tasks.create_task(collected(stage.engines, job(1)))
        await settled()
        assert "job 1 is under way already" in str(await collected(stage.engines, job(1)))
        assert "asks for 0 samples" in str(await collected(stage.engines, job(2, samples=0)))
