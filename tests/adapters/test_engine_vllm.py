"""vLLM samples what the learner's weights say, across updates, and wrong weights are found. Real vLLM, real gloo.

Skipped where vLLM is not installed; README.md has the line that installs its CPU build.
"""

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore
from transformers import PreTrainedModel

from azr_async.adapters.weights import WeightGroup, host_store
from azr_async.adapters.weights.vllm_plugin import BACKEND, EXTENSION
from azr_async.config import Config
from azr_async.errors import EngineError, RanksLost, WeightsError
from azr_async.messages import CancelJob, Completion, GenerateJob, GenerationResults, JoinWeights, Prompt
from azr_async.programs.engine_thread import Answer, Order
from azr_async.programs.engine_vllm import VllmServer
from azr_async.programs.placement import VLLM_ENVIRONMENT
from tests.random_models import VOCABULARY, a_job, full_pass_logp, random_model, save_random_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own, and of what it imports
    pytest.importorskip("vllm", reason="vLLM is not installed; README.md has the line for its CPU build")
    from azr_async.adapters.engines.vllm.engine import OnNewWeights, VllmEngine
    from azr_async.adapters.engines.vllm.opening import open_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
]

T = TypeVar("T")
CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32, the smallest that vLLM has on a CPU."""
KINDS = ["qwen2-tied", "llama-untied"]
CANARIES = tuple(np.random.default_rng(k).integers(0, VOCABULARY, 16, dtype=np.int32) for k in range(3))
DEADLINE_SECONDS = 8.0


@dataclass
class Served:
    """An engine in an event loop of its own, shared by all tests of the module, and the learner's end of its group."""

    loop: asyncio.AbstractEventLoop
    engine: VllmEngine
    model: PreTrainedModel
    store: TCPStore
    group: WeightGroup | None = None
    groups_built: int = 0
    version: int = 0
    history: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Weights of some versions."""

    def do(self, work: Awaitable[T]) -> T:
        """The result of some of the engine's work."""

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(120.0)

    @contextmanager
    def on_new_weights(self, what: OnNewWeights) -> Iterator[None]:
        before, self.engine._on_new_weights = self.engine._on_new_weights, what
        yield
        self.engine._on_new_weights = before

    async def build_group(self) -> None:
        """The learner's end and the engine's."""
        if self.group is not None:
            self.group.close()
        number = self.groups_built = self.groups_built + 1
        order = JoinWeights(host="127.0.0.1", port=self.store.port, rank=1, world_size=2, group=number)
        settings = {"group": number, "rank": 0, "world_size": 2, "deadline_seconds": DEADLINE_SECONDS}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.engine.join(order))
            self.group = await asyncio.to_thread(partial(WeightGroup, self.store, device=CPU, **settings))

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        assert self.group is not None
        return self.group.send(tensors, version=version, bucket_bytes=2**14).digest

    async def push(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The next version, whatever is in it."""
        self.version += 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(self.send, list(tensors), self.version))
            tasks.create_task(self.engine.update(self.version))

    def canary_error(self) -> float:
        """How far the engine is from the model on the fixed sequences, nats."""
        expected = [canary_logp(self.model, ids) for ids in CANARIES]
        return float(np.abs(self.do(self.engine.score(CANARIES)) - np.concatenate(expected)).max())


def canary_logp(model: PreTrainedModel, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float(), -1)
    logp_T: NDArray[np.float32] = logp_TV[np.arange(len(ids) - 1), ids[1:].astype(np.int64)].numpy()
    return logp_T


def changed(model: PreTrainedModel, seed: int) -> list[tuple[str, Tensor]]:
    """Every weight moved a little, as an optimizer step would; the model itself too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return named(model)


def named(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as one:
        yield one


@contextmanager
def running(kind: str, folder: Path) -> Iterator[Served]:
    """vLLM takes half a minute to start."""
    save_random_model(folder, kind, **SHAPE)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as starter:
        for name, value in VLLM_ENVIRONMENT.items():
            patch.setenv(name, value)
        config = Config.model_validate(
            {
                "engine": {"kind": "vllm", "slots": 16, "context_tokens": 192, "on_new_weights": "recompute"},
                "weights": {"deadline_seconds": DEADLINE_SECONDS},
                "propose": {"max_tokens": 64},
            }
        )
        settings = {"transfer_backend": BACKEND, "worker_extension": EXTENSION, "seed": 1}
        engine = starter.submit(partial(open_engine, str(folder), config, **settings)).result(180.0)
        one = Served(loop, engine, random_model(kind, **SHAPE), host_store("127.0.0.1", 0))
        one.do(one.build_group())
        one.do(one.push(named(one.model)))
        try:
            yield one
        finally:
            if one.group is not None:
                one.group.close()
            cores = [
                process
                for process in psutil.Process().children(recursive=True)
                if "EngineCore" in " ".join(process.cmdline())
            ]
            loop.call_soon_threadsafe(engine.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(60.0)
            loop.close()
            _, left = psutil.wait_procs(cores, timeout=30.0)
            assert not left, "vLLM's engine process outlived close()"


async def samples(engine: VllmEngine, *jobs: GenerateJob) -> list[Completion]:
    """All samples of all jobs, side by side."""
    return list(await asyncio.gather(*(engine.sample(job, n) for job in jobs for n in range(job.samples))))


async def interrupted(served: Served, jobs: list[GenerateJob], seeds: Iterable[int]) -> list[Completion]:
    """Samples during which the weights change once per seed, each time when some tokens have been written."""
    running = asyncio.create_task(samples(served.engine, *jobs))
    for seed in seeds:
        for _ in range(6):
            await served.engine.score(CANARIES[:1])  # a step of the engine, in which the others go on
        await served.push(changed(served.model, seed))
        served.history[served.version] = {name: value.clone() for name, value in served.model.state_dict().items()}
    return await running


def long_jobs(count: int = 4) -> list[GenerateJob]:
    return [a_job(n, "count " * (n + 1), samples=2, max_tokens=120) for n in range(count)]


def test_behavior_logp_equals_a_full_forward_pass_of_the_learners_weights(served: Served) -> None:
    served.do(served.push(changed(served.model, 1)))
    jobs = [a_job(n, "a b c " * (n % 5) + "x", samples=1 + n % 4, max_tokens=1 + 5 * (n % 7)) for n in range(12)]
    for completion in served.do(samples(served.engine, *jobs)):
        assert_allclose(completion.behavior_logp, full_pass_logp(served.model, completion), atol=1e-4)
        assert set(completion.token_version.tolist()) == {served.version}
    assert served.canary_error() < 1e-4


def test_greedy_is_the_most_likely_token_and_temperature_counts(served: Served) -> None:
    cold, warm = (a_job(1, "hello", max_tokens=20, temperature=t) for t in (0.0, 0.7))
    (greedy,), (tempered,) = served.do(samples(served.engine, cold)), served.do(samples(served.engine, warm))
    ids = np.concatenate([greedy.prompt_ids, greedy.token_ids]).astype(np.int64)
    with torch.no_grad():
        best_T = served.model(torch.from_numpy(ids)[None]).logits[0].argmax(-1).numpy()
    assert best_T[len(greedy.prompt_ids) - 1 : -1].tolist() == greedy.token_ids.tolist()
    assert_allclose(tempered.behavior_logp, full_pass_logp(served.model, tempered, 0.7), atol=1e-4)


def test_an_update_in_the_middle_recomputes_so_that_each_span_fits_its_own_weights(served: Served) -> None:
    served.history[served.version] = {name: value.clone() for name, value in served.model.state_dict().items()}
    completions = served.do(interrupted(served, long_jobs(), [11, 12]))
    spans = {tuple(sorted(set(completion.token_version.tolist()))) for completion in completions}
    assert max(map(len, spans)) > 1, "no sequence met an update"
    for completion in completions:
        assert (np.diff(completion.token_version) >= 0).all()
        for version in set(completion.token_version.tolist()):
            model = random_model(served.model.config.model_type + "-" + tied(served), **SHAPE)
            model.load_state_dict(served.history[version])
            is_its_T = completion.token_version == version
            expected_T = full_pass_logp(model, completion)
            assert_allclose(completion.behavior_logp[is_its_T], expected_T[is_its_T], atol=1e-4)


def tied(served: Served) -> str:
    return "tied" if served.model.config.tie_word_embeddings else "untied"


def test_a_kept_cache_is_told_apart_from_a_recomputed_one(served: Served) -> None:
    with served.on_new_weights("keep"):
        completions = served.do(interrupted(served, long_jobs(), [21]))
    error = max(
        float(np.abs(completion.behavior_logp - full_pass_logp(served.model, completion))[is_new_T].max(initial=0.0))
        for completion in completions
        for is_new_T in [completion.token_version == served.version]
        if not is_new_T.all()
    )
    assert 1e-4 < error < 5.0, "tokens after the update were sampled with keys and values of the weights before"
    fresh = served.do(samples(served.engine, *long_jobs()))  # the same prompts: nothing of the old cache is used
    for completion in fresh:
        assert_allclose(completion.behavior_logp, full_pass_logp(served.model, completion), atol=1e-4)


def test_what_waits_for_a_slot_during_a_push_starts_on_a_prompt_of_the_new_weights(served: Served) -> None:
    crowd = replace(endless_job(served), samples=24)  # of one prompt, for 16 slots: nobody's turn comes before the push
    with served.on_new_weights("keep"):
        completions = served.do(interrupted(served, [crowd], [22]))
    late = [one for one in completions if (one.token_version == served.version).all()]
    assert late, "no sample waited for a slot"
    for completion in late:
        assert_allclose(completion.behavior_logp, full_pass_logp(served.model, completion), atol=1e-4)


def endless_job(served: Served) -> GenerateJob:
    """Greedy, and of a prompt after which the model does not stop: no slot comes free by chance."""
    greedy = [a_job(n, "x" * n, temperature=0.0, max_tokens=120) for n in range(1, 20)]
    completions = served.do(samples(served.engine, *greedy))
    return next(job for job, one in zip(greedy, completions, strict=True) if one.finish == "length")


def test_a_canary_waits_for_no_sample(served: Served) -> None:
    endless = endless_job(served)

    async def score_among_many() -> int:
        before = served.engine.generated_tokens
        running = asyncio.create_task(samples(served.engine, replace(endless, samples=40)))
        for _ in range(3):
            await served.engine.score(CANARIES)
        ended = served.engine.generated_tokens - before
        await running
        return ended

    assert served.do(score_among_many()) == 0


def test_restarted_sequences_are_of_one_version(served: Served) -> None:
    with served.on_new_weights("restart"):
        completions = served.do(interrupted(served, long_jobs(), [31]))
    assert len(completions) == 8
    for completion in completions:
        assert len(set(completion.token_version.tolist())) == 1
    renewed = [completion for completion in completions if completion.token_version[0] == served.version]
    assert renewed, "no sequence met the update"
    for completion in renewed:
        assert_allclose(completion.behavior_logp, full_pass_logp(served.model, completion), atol=1e-4)


def test_samples_go_on_while_weights_arrive(served: Served) -> None:
    served.version += 1
    tensors, has_sampled = changed(served.model, 32), threading.Event()

    def slowly() -> Iterator[tuple[str, Tensor]]:
        yield from tensors[:2]
        assert has_sampled.wait(DEADLINE_SECONDS / 2), "no sample came while the engine was receiving"
        yield from tensors[2:]

    async def sample_meanwhile() -> Completion:
        sending = asyncio.create_task(asyncio.to_thread(served.send, slowly(), served.version))
        updating = asyncio.create_task(served.engine.update(served.version))
        while all(await served.engine._llm.collective_rpc("weights_have_arrived")):
            pass
        one = await served.engine.sample(a_job(1, max_tokens=5), 0)
        has_sampled.set()
        await asyncio.gather(sending, updating)
        return one

    assert set(served.do(sample_meanwhile()).token_version.tolist()) == {served.version - 1}
    assert served.canary_error() < 1e-4


def swapped(tensors: list[tuple[str, Tensor]], first: str, second: str) -> list[tuple[str, Tensor]]:
    by_name = dict(tensors)
    exchange = {first: second, second: first}
    return [(name, by_name[exchange.get(name, name)]) for name, _ in tensors]


def wrong_head(tensors: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The last of the tensors that say what token comes next: the head, or the embedding that is one too."""
    names = [name for name, _ in tensors]
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    return [(name, tensor.flip(0) if name == head else tensor) for name, tensor in tensors]


def exchanged_layers(tensors: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return swapped(tensors, "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("fault", [wrong_head, exchanged_layers])
def test_the_canary_finds_weights_that_are_not_the_learners(
    served: Served, fault: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]]
) -> None:
    served.do(served.push(fault(named(served.model))))
    assert served.canary_error() > 1e-3
    served.do(served.push(named(served.model)))
    assert served.canary_error() < 1e-4


def test_a_job_that_does_not_fit_is_refused_and_a_stop_text_ends_the_text(served: Served) -> None:
    assert [one.finish for one in served.engine.refused(a_job(1, "x" * 190, samples=2))] == ["prompt_too_long"] * 2
    assert served.engine.refused(a_job(2)) == []
    with pytest.raises(EngineError, match="asks for 0 samples"):
        served.engine.refused(a_job(3, samples=0))
    (free,) = served.do(samples(served.engine, a_job(4, "abc", max_tokens=60, temperature=0.0)))
    stop = free.text[5:7]
    job = a_job(5, max_tokens=60, temperature=0.0, prompt=Prompt(text="abc", stop=(stop,)))
    (stopped,) = served.do(samples(served.engine, job))
    assert stopped.text == free.text[: free.text.index(stop) + len(stop)]
    assert stopped.finish == "stop"


def test_a_sample_that_nobody_waits_for_is_aborted(served: Served) -> None:
    async def leave() -> int:
        running = asyncio.create_task(samples(served.engine, *long_jobs(8)))
        await served.engine.score(CANARIES[:1])
        running.cancel()
        await asyncio.wait([running])
        await served.engine.score(CANARIES[:1])
        return served.engine._llm.output_processor.get_num_unfinished_requests()

    assert served.do(leave()) == 0


def test_a_broadcast_that_breaks_leaves_the_old_weights_and_the_next_group_goes_on(served: Served) -> None:
    served.do(served.push(changed(served.model, 41)))
    old = served.version

    def some() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named(served.model)[:-1]:
            yield name, tensor + 1.0
        raise RuntimeError("as if the learner had died")

    def send_some() -> None:
        assert served.group is not None
        with pytest.raises(RuntimeError, match="as if the learner had died"):
            served.send(some(), old + 1)
        served.group.close()

    async def break_it() -> list[Completion]:
        running = asyncio.create_task(samples(served.engine, *long_jobs()))
        sending = asyncio.create_task(asyncio.to_thread(send_some))
        with pytest.raises(RanksLost, match="stopped answering"):
            await served.engine.update(old + 1)
        await sending
        return await running

    for completion in served.do(break_it()):
        assert_allclose(completion.behavior_logp, full_pass_logp(served.model, completion), atol=1e-4)
        assert set(completion.token_version.tolist()) == {old}
    served.do(served.build_group())
    served.version = old + 1
    served.do(served.push(changed(served.model, 42)))
    assert served.canary_error() < 1e-4


async def give_and_gather(server: VllmServer, orders: list[Order], wanted: int) -> list[Completion]:
    """What a server answers to orders, until it has answered with so many completions and is stopped."""
    done: list[Completion] = []

    def take(answer: Answer) -> None:
        done.extend(answer.completions if isinstance(answer, GenerationResults) else ())
        if len(done) >= wanted:
            server.stop()

    for order in orders:
        server.give(order)
    await server.run(take)
    return done


def test_a_server_makes_the_wanted_samples_of_the_jobs_that_were_not_cancelled(served: Served) -> None:
    server = VllmServer("inference-0", served.engine, ranks=1)
    orders: list[Order] = [
        a_job(1, samples=6, indices=(4, 1), max_tokens=10),
        a_job(2, samples=8, max_tokens=150),
        CancelJob(job_id=2),
        CancelJob(job_id=99),
        a_job(3, "x" * 190, samples=2),
    ]
    done = served.do(give_and_gather(server, orders, 4))
    assert sorted((one.job_id, one.index) for one in done) == [(1, 1), (1, 4), (3, 0), (3, 1)]
    assert not server._samples, "nothing is remembered of jobs that are over"


def test_weights_that_do_not_fit_the_model_are_an_error_and_nothing_is_sampled_with_them(served: Served) -> None:
    """Last but one: vLLM is of no use after an update that failed. One model lacks a parameter, one gets too many."""
    fitting = named(served.model)
    if served.model.config.tie_word_embeddings:
        sent, told = (
            [pair for pair in fitting if pair[0] != "model.norm.weight"],
            r"without 1 parameters .*model\.norm\.weight",
        )
    else:
        sent, told = [*fitting, ("model.layers.0.nonsense.weight", torch.zeros(3))], "nonsense"

    async def push() -> None:
        sending = asyncio.create_task(asyncio.to_thread(served.send, sent, served.version + 1))
        with pytest.raises(WeightsError, match=told) as error:
            await served.engine.update(served.version + 1)
        assert not isinstance(error.value, RanksLost), "it would be waited for another group, and sampled on"
        await sending
        assert await served.engine._llm.is_paused()

    served.do(push())


def test_the_death_of_vllms_processes_is_an_error_that_says_so(served: Served) -> None:
    """Last: it kills the engine."""

    async def kill() -> None:
        running = asyncio.create_task(served.engine.score(CANARIES))
        for process in psutil.Process().children():
            if "EngineCore" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="engine process has died"):
            await running

    served.do(kill())
