"""Generates many sequences side by side; new ones join and old ones leave between any two tokens."""

import time
from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azr_async.adapters.engines.embedded.cache import prefill_order
from azr_async.adapters.engines.embedded.forward import Forward, check_attention_span
from azr_async.adapters.engines.embedded.installation import Installation
from azr_async.adapters.engines.embedded.pace import Pace
from azr_async.adapters.engines.embedded.rows import Rows, Sequence, compaction
from azr_async.adapters.engines.embedded.waiting import Waiting
from azr_async.adapters.engines.jobs import check_finite, check_job, refusals
from azr_async.adapters.engines.texts import Texts, end_ids
from azr_async.algorithm.sampling import drawn, sampled_logp, uniforms
from azr_async.messages import Completion, GenerateJob, Int32s

PREFILL_TOKENS: Final = 8192
"""Largest padded size of one prefill; bounds its memory."""

EndedRows = dict[int, Literal["stop", "length"]]


class EmbeddedEngine:
    """Synchronous core; its owner calls `step` while `has_work`. Not for several threads at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int,
        context_tokens: int,
        on_new_weights: Literal["keep", "recompute", "restart"] = "keep",
    ) -> None:
        """Raises EngineError when the model cannot be served: the reason and what to do."""
        check_attention_span(model, context_tokens)
        self.version = 0
        """Of the weights that sample now."""
        self.busy_seconds = 0.0
        self.generated_tokens = 0
        self._slots, self._context_tokens, self._on_new_weights = slots, context_tokens, on_new_weights
        self._installation = Installation(model)
        self._texts = Texts(tokenizer, end_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer))
        self._is_end_V = np.isin(np.arange(model.config.get_text_config().vocab_size), list(self._texts.end_ids))
        self._waiting = Waiting()
        self._refused: list[Completion] = []
        self._rows = Rows.empty(slots, context_tokens)
        self._running = 0
        with torch.inference_mode():
            self._forward = Forward(model)
            self.clock_seconds = time.thread_time if self._forward.device.type == "cpu" else time.perf_counter
            """Of what the work costs: on a CPU the processor time of the thread that asks."""
            self.pace = Pace(self.clock_seconds)
            self._cache = self._forward.empty_cache(slots=slots, context_tokens=context_tokens)

    @property
    def has_work(self) -> bool:
        """Would `step` do anything?"""
        return bool(self._running or self._waiting or self._refused)

    def submit(self, job: GenerateJob) -> None:
        """Queue the job's samples; lower (priority, job_id) goes first. Raises EngineError when it makes no sense."""
        check_job(job)
        prompt_ids = self._texts.prompt_ids(job.prompt)
        if len(prompt_ids) + job.max_tokens > self._context_tokens:
            self._refused += refusals(job)
        else:
            self._waiting.add(job, prompt_ids)

    @torch.inference_mode()
    def cancel(self, job_id: int) -> None:
        """Drop what is left of a job."""
        self._waiting.drop(job_id)
        running = self._rows.sequence_S[: self._running]
        self._close(np.array([row for row, sequence in enumerate(running) if sequence.job_id == job_id], np.int64))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token for every running sequence. Returns those that ended; raises EngineError for weights gone bad."""
        began_seconds = time.perf_counter()
        completions, self._refused = self._refused, []
        free = self._slots - self._running
        # A prefill costs about as much as a small step, whatever its size: let a few rows come free before the next.
        if self._waiting and free >= max(1, self._slots // 16):
            groups = self._waiting.take(free)
            with self.pace.prefill(len(groups), sum(len(group[0].prompt_ids) for group in groups)):
                self._admit(groups)
        if self._running:
            with self.pace.step(self._running):
                self._sample()
                completions += self._retire(self._ended())
        self.busy_seconds += time.perf_counter() - began_seconds
        return completions

    def begin_update(self) -> None:
        """New weights follow, in one or several calls of `install`."""
        self._installation.begin()

    def install(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite parameters. Raises WeightsError when the model has no such parameter, or of another shape."""
        self._installation.install(tensors)

    @torch.inference_mode()
    def finish_update(self, version: int) -> None:
        """Sample with what was installed from now on. Raises WeightsError when a parameter did not come."""
        self._installation.finish(version)
        self.version = version
        if self._on_new_weights == "recompute":
            self._recompute()
        if self._on_new_weights == "restart":
            for sequence in self._rows.sequence_S[: self._running]:
                self._waiting.put(sequence)
            self._close(np.arange(self._running))

    @torch.inference_mode()
    def score(self, sequences: Many[Int32s]) -> NDArray[np.float32]:
        """Log-probabilities of all tokens but the first of each sequence, joined; nats, untempered."""
        scores: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(sequences)
        for batch in prefill_order([len(ids) for ids in sequences], PREFILL_TOKENS):
            for n, scored_T in zip(batch, self._forward.score([sequences[n] for n in batch]), strict=True):
                scores[n] = scored_T
        return np.concatenate([np.zeros(0, np.float32), *scores])

    def _admit(self, groups: list[list[Sequence]]) -> None:
        """Give rows to sequences; those of one group share a prompt and its prefill."""
        # The last prompt token is not prefilled but decoded: so first tokens are sampled where all the others are.
        prefixes = [group[0].prompt_ids[:-1] for group in groups]
        for batch in prefill_order([len(ids) for ids in prefixes], PREFILL_TOKENS):
            for sequence in (sequence for n in batch for sequence in groups[n]):
                self._rows.fill(self._running, sequence)
                self._running += 1
            length = max(len(prefixes[n]) for n in batch)
            if length == 0:
                self._cache.append_empty(self._running)
                continue
            source_B = np.repeat(np.arange(len(batch)), [len(groups[n]) for n in batch])
            contents = self._forward.prefill([prefixes[n] for n in batch])
            source = torch.from_numpy(source_B).to(self._forward.device)
            self._cache.append(contents, source, length, self._longest_cached())

    def _sample(self) -> None:
        """Feed every running row's last token, draw its next one."""
        count, rows = self._running, self._rows
        cached_B = rows.length_S[:count] - 1
        logits_BV = self._forward.decode(rows.tokens_SC[np.arange(count), cached_B], cached_B, self._cache)
        token_B, logp_B = _drawn_tokens(logits_BV, rows, count)
        check_finite(logp_B, self.version)
        rows.append_token(count, token_B, logp_B, self.version)
        self.generated_tokens += count

    def _ended(self) -> EndedRows:
        """The rows whose last token ended them, and why."""
        count, rows = self._running, self._rows
        length_B = rows.length_S[:count]
        is_end_B = self._is_end_V[rows.tokens_SC[np.arange(count), length_B - 1]]
        is_full_B = length_B >= rows.limit_S[:count]
        for row in np.flatnonzero(rows.has_stop_S[:count] & ~is_end_B):
            completion_T = rows.tokens_SC[row, rows.prompt_length_S[row] : length_B[row]]
            is_end_B[row] = self._texts.has_stopped(rows.sequence_S[row].prompt, completion_T)
        return {int(row): "stop" if is_end_B[row] else "length" for row in np.flatnonzero(is_end_B | is_full_B)}

    def _retire(self, ended: EndedRows) -> list[Completion]:
        """Hand out what the ended rows hold, and close them."""
        completions = [self._rows.completion(row, finish, self._texts) for row, finish in ended.items()]
        self._close(np.array(list(ended), np.int64))
        return completions

    def _close(self, rows_B: NDArray[np.int64]) -> None:
        """Take rows out of the running ones."""
        if len(rows_B) == 0:
            return
        holes_B, movers_B = compaction(self._running, rows_B)
        self._running -= len(rows_B)
        self._rows.move(holes_B, movers_B)
        self._cache.compact(holes_B, movers_B, self._running, self._longest_cached())

    def _recompute(self) -> None:
        """Bring the cache of all running sequences up to the new weights."""
        cached = [self._rows.tokens_SC[row, : self._rows.length_S[row] - 1] for row in range(self._running)]
        for batch in prefill_order([len(ids) for ids in cached], PREFILL_TOKENS):
            length = max(len(cached[n]) for n in batch)
            if length:
                contents = self._forward.prefill([cached[n] for n in batch])
                self._cache.replace(contents, torch.tensor(batch, device=self._forward.device), length)

    def _longest_cached(self) -> int:
        return int(self._rows.length_S[: self._running].max(initial=1)) - 1


def _drawn_tokens(logits_BV: Tensor, rows: Rows, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The next token of each row by its own settings and random stream, and its behaviour logp in nats."""
    device = logits_BV.device
    temperature_B, top_p_B = rows.temperature_S[:count], rows.top_p_S[:count]
    logp_BV = sampled_logp(
        logits_BV,
        None if (temperature_B == 1).all() else torch.from_numpy(temperature_B).to(device),
        None if (top_p_B >= 1).all() else torch.from_numpy(top_p_B).to(device),
    )
    uniform_B = uniforms(rows.key_S[:count], rows.length_S[:count] - rows.prompt_length_S[:count])
    token_B = drawn(logp_BV, torch.from_numpy(uniform_B).to(device))
    return token_B.cpu().numpy(), logp_BV.gather(1, token_B[:, None])[:, 0].cpu().numpy()
