"""An inference worker between a real self-play end and a real learner end: jobs, pushes, endings."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import zmq.asyncio
from numpy.testing import assert_allclose

from azr_async.adapters.channels import ZmqReceiver, ZmqSender, protocol, zmq_receiver, zmq_sender
from azr_async.adapters.weights import WeightGroup, host_store
from azr_async.config import Config, EngineConfig, ModelConfig, WeightsConfig, WiresConfig
from azr_async.errors import WeightsError
from azr_async.messages import (
    CancelJob,
    Completion,
    GenerateJob,
    GenerationResults,
    GivenUp,
    JoinWeights,
    PushWeights,
    WeightsInstalled,
    WeightsJoined,
    WorkerReady,
)
from azr_async.programs.engine_thread import Answer, Order, embedded_server
from azr_async.programs.inference import Client, serve
from azr_async.programs.wiring import Reporter, endpoint
from tests.random_models import a_job, full_pass_logp, random_model, save_random_model

NAME = "inference-0"
CANARY_IDS = (np.arange(2, 12, dtype=np.int32), np.arange(50, 57, dtype=np.int32))


@dataclass(frozen=True)
class Place:
    config: Config
    wires_dir: Path


@pytest.fixture
def place() -> Iterator[Place]:
    with TemporaryDirectory() as folder:
        model, wires = Path(folder, "model"), Path(folder, "wires")
        save_random_model(model)
        wires.mkdir()
        config = Config(
            model=ModelConfig(path=str(model)),
            engine=EngineConfig(slots=8, context_tokens=200),
            weights=WeightsConfig(deadline_seconds=20.0),
            wires=WiresConfig(start_seconds=30.0),
        )
        yield Place(config, wires)


@dataclass
class Peers:
    """What self-play and the learner hold of the worker."""

    results: ZmqReceiver[WorkerReady | GenerationResults]
    answers: ZmqReceiver[WorkerReady | WeightsJoined | WeightsInstalled]
    jobs: ZmqSender[GenerateJob]
    pushes: ZmqSender[JoinWeights | PushWeights | GivenUp]
    close_selfplay: Callable[[], Awaitable[None]]
    close_pushes: Callable[[], Awaitable[None]]

    async def completions(self, count: int) -> list[Completion]:
        found: list[Completion] = []
        while len(found) < count:
            message = await anext(self.results)
            assert isinstance(message, GenerationResults)
            assert message.worker == NAME
            found += message.completions
        return found

    async def join(self) -> WeightGroup:
        store = host_store("127.0.0.1", 0)
        await self.pushes.send(JoinWeights(host="127.0.0.1", port=store.port, rank=1, world_size=2, group=0))
        group = await asyncio.to_thread(
            partial(
                WeightGroup,
                store,
                group=0,
                rank=0,
                world_size=2,
                device=torch.device("cpu"),
                deadline_seconds=20.0,
            )
        )
        assert await anext(self.answers) == WeightsJoined(worker=NAME, group=0)
        return group

    async def push(self, group: WeightGroup, seed: int, version: int) -> WeightsInstalled:
        weights = [(name, tensor.detach()) for name, tensor in random_model("qwen2-tied", seed).named_parameters()]
        await self.pushes.send(PushWeights(version=version, group=0, canary_ids=CANARY_IDS))
        await asyncio.to_thread(partial(group.send, weights, version=version, bucket_bytes=2**16))
        answer = await anext(self.answers)
        assert isinstance(answer, WeightsInstalled)
        return answer


@asynccontextmanager
async def peers(place: Place) -> AsyncIterator[Peers]:
    """Listen, wait for the worker, connect; leaving closes self-play's end, then the learner's."""
    results: ZmqReceiver[WorkerReady | GenerationResults] = zmq_receiver(
        endpoint(place.config, place.wires_dir, "selfplay-results"),
        (WorkerReady, GenerationResults),
        name="selfplay",
        capacity=16,
    )
    answers: ZmqReceiver[WorkerReady | WeightsJoined | WeightsInstalled] = zmq_receiver(
        endpoint(place.config, place.wires_dir, "learner-weights"),
        (WorkerReady, WeightsJoined, WeightsInstalled),
        name="learner-0",
        capacity=16,
    )
    async with answers, AsyncExitStack() as of_learner, AsyncExitStack() as of_selfplay:
        await of_selfplay.enter_async_context(results)
        ready, also_ready = await anext(results), await anext(answers)
        assert isinstance(ready, WorkerReady)
        assert isinstance(also_ready, WorkerReady)
        assert (ready.worker, ready.slots, also_ready.worker) == (NAME, 8, NAME)
        jobs: ZmqSender[GenerateJob] = zmq_sender(ready.endpoint, name="selfplay", peer=NAME)
        pushes: ZmqSender[JoinWeights | PushWeights | GivenUp] = zmq_sender(
            also_ready.endpoint, name="learner-0", peer=NAME
        )
        await of_selfplay.enter_async_context(jobs)
        await of_learner.enter_async_context(pushes)
        yield Peers(results, answers, jobs, pushes, of_selfplay.aclose, of_learner.aclose)


async def test_jobs_come_back_and_the_worker_ends_when_both_peers_have_closed(place: Place) -> None:
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(Reporter(NAME), name=NAME, config=place.config, wires_dir=place.wires_dir))
        async with peers(place) as ends:
            for number in range(5):
                await ends.jobs.send(a_job(number, samples=4))
            found = await ends.completions(20)
            assert {(done.job_id, done.index) for done in found} == {(job, n) for job in range(5) for n in range(4)}
        await serving


async def test_pushed_weights_sample_score_and_stamp(place: Place) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(Reporter(NAME), name=NAME, config=place.config, wires_dir=place.wires_dir))
        async with peers(place) as ends:
            group = await ends.join()
            for version, seed in ((1, 11), (2, 12)):
                installed = await ends.push(group, seed, version)
                assert installed.version == version
                assert installed.pause_seconds > 0
                new = random_model("qwen2-tied", seed)
                expected = [canary_logp(new, ids) for ids in CANARY_IDS]
                assert_allclose(installed.canary_logp, np.concatenate(expected), atol=1e-4)
                await ends.jobs.send(a_job(version))
                (done,) = await ends.completions(1)
                assert set(done.token_version.tolist()) == {version}
                assert_allclose(done.behavior_logp, full_pass_logp(new, done), atol=1e-4)
            await asyncio.to_thread(group.close)


async def test_a_push_goes_between_two_tokens_of_running_sequences(place: Place) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(Reporter(NAME), name=NAME, config=place.config, wires_dir=place.wires_dir))
        async with peers(place) as ends:
            group = await ends.join()
            await ends.jobs.send(a_job(samples=16, max_tokens=190))
            first = await ends.completions(1)
            await ends.push(group, 5, 1)
            rest = await ends.completions(16 - len(first))
            spans = [done.token_version.tolist() for done in rest]
            assert all(versions == sorted(versions) for versions in spans)
            assert any(set(versions) == {0, 1} for versions in spans)
            await asyncio.to_thread(group.close)


async def test_self_play_may_take_the_time_of_a_stop_to_close_after_the_learner(place: Place) -> None:
    quick = place.config.model_copy(update={"weights": WeightsConfig(deadline_seconds=0.2)})
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(Reporter(NAME), name=NAME, config=quick, wires_dir=place.wires_dir))
        async with peers(place) as ends:
            await ends.close_pushes()
            closed_seconds = time.monotonic()
            while time.monotonic() < closed_seconds + 3 * quick.weights.deadline_seconds:
                await ends.jobs.send(a_job())
                await ends.completions(1)
        await serving


@pytest.mark.parametrize("is_self_play_gone", [False, True])
async def test_a_worker_that_is_given_up_fails_with_the_reason_of_the_learner(
    place: Place, is_self_play_gone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    serving = asyncio.get_running_loop().create_task(
        serve(Reporter(NAME), name=NAME, config=place.config, wires_dir=place.wires_dir)
    )
    async with peers(place) as ends:
        if is_self_play_gone:
            await ends.close_selfplay()
            while "self-play is gone" not in caplog.text:  # noqa: ASYNC110 - the log is all that tells
                await asyncio.sleep(0)
        await ends.pushes.send(GivenUp(why="it was late."))
        await asyncio.wait([serving])
    with pytest.raises(ExceptionGroup) as error:
        await serving
    assert error.group_contains(WeightsError, match="the learner goes on without this worker: it was late.")


async def test_a_self_play_that_does_not_close_after_the_learner_is_an_error(place: Place) -> None:
    wires = WiresConfig(start_seconds=30.0, stop_seconds=0.3)
    quick = place.config.model_copy(update={"weights": WeightsConfig(deadline_seconds=0.2), "wires": wires})
    serving = asyncio.get_running_loop().create_task(
        serve(Reporter(NAME), name=NAME, config=quick, wires_dir=place.wires_dir)
    )
    async with peers(place) as ends:
        await ends.close_pushes()
        await asyncio.wait([serving])
    with pytest.raises(ExceptionGroup) as error:
        await serving
    assert error.group_contains(WeightsError, match=r"closed its end 0.3 s ago, and self-play did not")


class Given:
    """Fulfils EngineServer for whoever only orders: what it was given."""

    ranks = 1

    def __init__(self) -> None:
        self.given: list[Order] = []

    def give(self, order: Order) -> None:
        self.given.append(order)

    def stop(self) -> None:
        raise AssertionError

    async def run(self, answer: Callable[[Answer], object]) -> None:
        raise AssertionError


async def test_a_self_play_that_hangs_costs_its_jobs_not_the_worker(place: Place) -> None:
    """It joins the worker, takes its greeting, and says nothing more; the worker leaves, and greets whoever is next."""
    address, engine = f"ipc://{place.wires_dir}/results", Given()
    client = Client(
        WorkerReady(worker=NAME, endpoint="", slots=1, ranks=1, incarnation=1),
        engine,
        lambda: zmq_sender(address, name=NAME, peer="selfplay", heartbeat_seconds=0.05, peer_timeout_seconds=1.0),
    )
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as selfplay:
        selfplay.set(zmq.LINGER, 0)
        selfplay.bind(address)
        serving = asyncio.ensure_future(client.serve())
        first, *_ = await selfplay.recv_multipart()
        welcome = protocol.WELCOME, protocol.number_frame(9), protocol.number_frame(1000)
        await selfplay.send_multipart([first, *protocol.sealed(*welcome)])
        while (await selfplay.recv_multipart())[1] != protocol.DATA:
            pass
        client.take(a_job(7))
        client.went_silent()
        identity, kind, *_ = await selfplay.recv_multipart()
        while (identity, kind) == (first, kind) or kind != protocol.HELLO:
            identity, kind, *_ = await selfplay.recv_multipart()
        assert not serving.done()
        client.take(a_job(8))  # on its way since before: nobody waits for it any more
        assert engine.given == [a_job(7), CancelJob(job_id=7)]
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving


async def test_a_request_to_stop_ends_a_worker_that_is_busy(place: Place) -> None:
    reporter = Reporter(NAME)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(reporter, name=NAME, config=place.config, wires_dir=place.wires_dir))
        async with peers(place) as ends:
            await ends.jobs.send(a_job(samples=64, max_tokens=190))
            await ends.completions(1)
            reporter.stop_requested.set()
            await serving


async def test_cancelling_a_busy_worker_leaves_no_thread_and_no_socket(place: Place) -> None:
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(Reporter(NAME), name=NAME, config=place.config, wires_dir=place.wires_dir))
        async with peers(place) as ends:
            await ends.jobs.send(a_job(samples=64, max_tokens=190))
            await ends.completions(1)
            serving.cancel()
            await asyncio.wait([serving])
            assert serving.cancelled()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine")]
    assert list(place.wires_dir.iterdir()) == []


async def test_a_push_without_a_group_ends_the_worker_with_the_reason(place: Place) -> None:
    serving = asyncio.get_running_loop().create_task(
        serve(Reporter(NAME), name=NAME, config=place.config, wires_dir=place.wires_dir)
    )
    async with peers(place) as ends:
        await ends.pushes.send(PushWeights(version=1, group=0, canary_ids=CANARY_IDS))
        await asyncio.wait([serving])
    with pytest.raises(ExceptionGroup) as error:
        await serving
    assert error.group_contains(WeightsError, match="before inference-0 was asked to join")


def canary_logp(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    return np.take_along_axis(torch.log_softmax(logits, -1).numpy(), ids[1:, None].astype(np.int64), -1)[:, 0]


async def test_whatever_goes_wrong_where_weights_arrive_ends_the_worker_with_its_cause(place: Place) -> None:
    async with embedded_server(place.config, NAME) as server:

        def run_out_of_memory() -> None:
            raise MemoryError("no room for a bucket")

        server._about_weights(run_out_of_memory)
        with pytest.raises(MemoryError, match="no room for a bucket"):
            await server.run(lambda answer: None)
