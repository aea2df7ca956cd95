"""An engine without a model."""

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np

from azr_async.messages import Completion, GenerateJob


class ScriptedEngine:
    """The `Engine` port without a model: a rule writes the answers. For tests, benchmarks and simulation.

    A token is a byte of the text's UTF-8, and `END_OF_SEQUENCE` closes every answer that was not cut.
    """

    END_OF_SEQUENCE = 256

    def __init__(self, answer: Callable[[GenerateJob, int], str], *, version: Callable[[], int] = lambda: 0) -> None:
        """Args:
        answer: the text of a job's sample number n.
        version: of the weights that sample; asked once for each completion.
        """
        self._answer, self._version = answer, version

    async def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        """The job's completions in the order of their index."""
        for index in job.wanted:
            await asyncio.sleep(0)  # as with a real engine, others get their turn
            yield self._completion(job, index)

    def _completion(self, job: GenerateJob, index: int) -> Completion:
        text = self._answer(job, index)
        tokens = [*text.encode(), self.END_OF_SEQUENCE]
        is_cut = len(tokens) > job.max_tokens
        token_ids = np.array(tokens[: job.max_tokens], np.int32)
        return Completion(
            job_id=job.job_id,
            index=index,
            finish="length" if is_cut else "stop",
            text=bytes(tokens[: job.max_tokens]).decode(errors="ignore") if is_cut else text,
            prompt_ids=np.array(list(job.prompt.text.encode()), np.int32),
            token_ids=token_ids,
            behavior_logp=(-(1 + token_ids % 8) / 8).astype(np.float32),
            token_version=np.full(len(token_ids), self._version(), np.int32),
        )
