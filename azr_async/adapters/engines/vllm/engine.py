"""vLLM behind the same jobs, pushes and canaries as the embedded engine.

vLLM runs in processes of its own; what happens there - batching, the key-value cache, receiving weights - is asked for
through its public interface for asynchronous reinforcement learning, but for the pause (`_pause` says why).
docs/engines.md tells the whole story.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from azr_async.adapters.engines.gate import Gate
from azr_async.adapters.engines.jobs import check_finite, check_job, refusals
from azr_async.adapters.engines.texts import Texts
from azr_async.adapters.engines.vllm.stopwatch import Stopwatch
from azr_async.errors import EngineError, RanksLost, WeightsError
from azr_async.messages import Completion, GenerateJob, Int32s, JoinWeights

OnNewWeights = Literal["keep", "recompute", "restart"]

_PROMPTS_REMEMBERED: Final = 1024
CANARY_SLOTS: Final = 4
"""Sequences that vLLM has room for beside the samples, so that a canary waits for none of them."""
_LOOK_SECONDS: Final = 0.005
"""How often vLLM's processes are asked whether they have received what comes beside their steps."""
_FIRST_OF_ALL: Final = -(2**31)
_AS_LOADED: Final = "default"
"""What vLLM calls the weights that it has read from the disk; the embedded engine's version 0."""


class VllmEngine:
    """Serves samples side by side; all methods belong to one event loop."""

    def __init__(
        self,
        llm: AsyncLLM,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        *,
        slots: int,
        context_tokens: int,
        on_new_weights: OnNewWeights,
        weights_device: Literal["cpu", "cuda"],
        deadline_seconds: float,
    ) -> None:
        """Args:
        llm: as `opening.open_engine` starts it, with room for `slots` samples and `CANARY_SLOTS` more.
        tokenizer: the model's.
        end_ids: tokens that end an answer.
        slots: samples side by side.
        context_tokens: longest prompt plus completion.
        on_new_weights: what happens to running sequences: they go on with the key-value cache of the old weights
            (`keep`), with one that the new weights recompute, or start again (`restart`).
        weights_device: where weights are while they are broadcast.
        deadline_seconds: for everything that vLLM is asked to do about weights.
        """
        self.generated_tokens = 0
        self._llm, self._context_tokens, self._deadline_seconds = llm, context_tokens, deadline_seconds
        self._on_new_weights, self._weights_device = on_new_weights, weights_device
        self._texts = Texts(tokenizer, end_ids)
        self._prompt_ids = lru_cache(_PROMPTS_REMEMBERED)(self._texts.prompt_ids)  # all samples of a job have one
        self._version = 0
        self._numbers = itertools.count()
        self._busy, self._gate = Stopwatch(), Gate(slots)

    @property
    def busy_seconds(self) -> float:
        """Total so far: wall time in which something was being generated."""
        return self._busy.seconds()

    def refused(self, job: GenerateJob) -> list[Completion]:
        """The answers to a job that leaves no room for its completions; none if it does.

        Raises EngineError when the job makes no sense.
        """
        check_job(job)
        has_room = len(self._prompt_ids(job.prompt)) + job.max_tokens <= self._context_tokens
        return [] if has_room else refusals(job)

    async def sample(self, job: GenerateJob, index: int) -> Completion:
        """Sample number `index` of a job. Raises EngineError when vLLM fails, CancelledError after `cancel`."""
        prompt_ids = self._prompt_ids(job.prompt)
        parameters = self._parameters(job)
        output = None
        while output is None or output.finish_reason == "abort":
            async with self._gate.admitted(job.priority, job.job_id):
                with self._busy.running():
                    ended = await self._generate(prompt_ids, parameters, priority=job.priority)
            output = ended.outputs[0]
        self.generated_tokens += len(output.token_ids)
        return self._completion(job, index, prompt_ids, output)

    async def join(self, order: JoinWeights) -> None:
        """Become ranks of a weight group. Raises RanksLost naming who did not come."""
        init_info = {
            "host": order.host,
            "port": order.port,
            "group": order.group,
            "first_rank": order.rank,
            "world_size": order.world_size,
            "device": self._weights_device,
            "deadline_seconds": self._deadline_seconds,
        }
        async with self._asked_to("join a weight group", else_raise=RanksLost):
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def update(self, version: int) -> float:
        """Take part in the broadcast of `version` and sample with it from now on; seconds without sampling.

        Weights that go through the host's memory are received beside its steps, for its model stays whole until they
        are put to use. Between GPUs they come into the model itself, so the pause comes first. What it is
        counted from is the request for it, so the step under way is in it.

        Raises:
            RanksLost: the broadcast did not come to its end. Where weights go through the host's memory, sampling goes
                on with the old ones; between GPUs some are overwritten, and it waits until a later update succeeds.
            WeightsError: vLLM did not answer, or what came does not fill the model.
        """
        in_place = self._weights_device != "cpu"
        if not in_place:
            await self._start(version)
            await self._receive(version)
        self._gate.shut()  # a sample that begins now would begin with a cached prompt of the old weights
        began_seconds = time.perf_counter()
        with self._busy.held():
            await self._pause(version)
            if in_place:
                await self._start(version)
                await self._receive(version)
            await self._use(version)
        self._gate.open()
        return time.perf_counter() - began_seconds

    async def _pause(self, version: int) -> None:
        async with self._asked_to(f"pause for version {version}", else_raise=WeightsError):
            if self._on_new_weights == "keep":
                # What `pause_generation` asks for as well; afterwards that sleeps for 20 ms, so that its caller reads
                # the last step's results before it goes on. Here nothing depends on it, and it is a third of a pause.
                await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            else:
                mode: Literal["abort", "keep"] = "abort" if self._on_new_weights == "restart" else "keep"
                await self._llm.pause_generation(mode=mode, clear_cache=True)

    async def _start(self, version: int) -> None:
        async with self._asked_to(f"prepare for version {version}", else_raise=WeightsError):
            await self._llm.start_weight_update()

    async def _receive(self, version: int) -> None:
        async with self._asked_to(f"say whether version {version} is there", else_raise=WeightsError):
            # It tells nothing that it is not asked for, and would make no step while it waits.
            while not all(await self._llm.collective_rpc("weights_have_arrived")):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_SECONDS)
        async with self._asked_to(f"receive version {version}", else_raise=RanksLost):
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"version": version}))

    async def _use(self, version: int) -> None:
        async with self._asked_to(f"use version {version}", else_raise=WeightsError):
            await self._llm.finish_weight_update(weight_version=str(version))
            self._version = version
            await self._llm.resume_generation()

    async def score(self, sequences: Sequence[Int32s]) -> NDArray[np.float32]:
        """Log-probabilities of all tokens but the first of each sequence, joined; nats, untempered.

        Raises WeightsError when vLLM does not answer in time.
        """
        try:
            async with asyncio.timeout(2 * self._deadline_seconds):
                scored = await asyncio.gather(*(self._score(ids) for ids in sequences))
        except TimeoutError:
            raise self._silent("score the canaries") from None
        return np.concatenate([np.zeros(0, np.float32), *scored])

    def close(self) -> None:
        """End vLLM and its processes; samples under way fail."""
        self._llm.shutdown()

    @asynccontextmanager
    async def _asked_to(self, do: str, *, else_raise: type[WeightsError]) -> AsyncIterator[None]:
        """Whatever vLLM raises, or that it does not answer, as one error that names what it was to do."""
        try:
            async with asyncio.timeout(2 * self._deadline_seconds):
                yield
        except TimeoutError:
            raise self._silent(do) from None
        except EngineDeadError as error:
            raise WeightsError(
                f"vLLM's engine process died when it was to {do}. Look into this worker's log."
            ) from error
        except Exception as error:
            raise else_raise(f"vLLM could not {do}: {error}") from error

    def _silent(self, do: str) -> WeightsError:
        return WeightsError(
            f"vLLM did not {do} within {2 * self._deadline_seconds:g} s, twice weights.deadline_seconds. "
            "Look into this worker's log; raise the deadline if it was only slow."
        )

    async def _score(self, ids: Int32s) -> NDArray[np.float32]:
        parameters = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False
        )
        ended = await self._generate(ids, parameters, priority=_FIRST_OF_ALL)
        logprobs: Any = ended.prompt_logprobs
        if logprobs is None or len(logprobs) != len(ids):
            raise EngineError("vLLM scored no canary tokens. Install the vLLM that pyproject.toml names.")
        return np.array([logprobs[n][int(ids[n])].logprob for n in range(1, len(ids))], np.float32)

    async def _generate(self, prompt_ids: Int32s, parameters: SamplingParams, *, priority: int) -> RequestOutput:
        """One request, in whatever way it ends; leaving early aborts it."""
        # What is handed over under other weights shares no cached prompt.
        prompt = TokensPrompt(prompt_token_ids=prompt_ids.tolist(), cache_salt=str(self._version))
        ended: RequestOutput | None = None
        try:
            async for output in self._llm.generate(prompt, parameters, str(next(self._numbers)), priority=priority):
                ended = output
        except EngineDeadError as error:
            raise EngineError(
                "vLLM's engine process has died. The end of this worker's log says why; memory is the usual reason: "
                "lower engine.slots, engine.context_tokens or engine.memory_share."
            ) from error
        if ended is None:
            raise EngineError("vLLM ended a request without an answer. Look into this worker's log.")
        return ended

    def _parameters(self, job: GenerateJob) -> SamplingParams:
        # No seed of its own: a batch's numerics depend on who else is in it, so one would reproduce nothing, and it
        # makes vLLM draw row by row.
        return SamplingParams(
            temperature=job.temperature,
            top_p=job.top_p,
            max_tokens=job.max_tokens,
            logprobs=0,
            stop=list(job.prompt.stop),
            include_stop_str_in_output=True,
            stop_token_ids=sorted(self._texts.end_ids),
            detokenize=bool(job.prompt.stop),
            skip_special_tokens=not job.prompt.keep_special_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, job: GenerateJob, index: int, prompt_ids: Int32s, output: CompletionOutput) -> Completion:
        token_ids = np.asarray(output.token_ids, np.int32)
        logprobs: Any = output.logprobs or ()
        logp = np.array([one[token].logprob for one, token in zip(logprobs, output.token_ids, strict=True)], np.float32)
        check_finite(logp, self._version)
        return Completion(
            job_id=job.job_id,
            index=index,
            finish="length" if output.finish_reason == "length" else "stop",
            text=self._texts.completion_text(job.prompt, token_ids),
            prompt_ids=prompt_ids,
            token_ids=token_ids,
            behavior_logp=logp,
            token_version=_token_versions(output, len(token_ids)),
        )


def _token_versions(output: CompletionOutput, count: int) -> NDArray[np.int32]:
    """[T] the version that sampled each token, as vLLM attests it in contiguous spans."""
    version_T = np.full(count, -1, np.int32)
    for span in output.weight_versions or ():
        version_T[span.start : span.end] = 0 if span.version == _AS_LOADED else int(span.version)
    if count and version_T.min() < 0:
        raise EngineError("vLLM did not say which weights sampled a token. Install the vLLM that pyproject.toml names.")
    return version_T
