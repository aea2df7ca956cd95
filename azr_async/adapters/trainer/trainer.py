"""The optimizer step, alike on one CPU process, on several (gloo) and on GPUs (NCCL).

Every rank is given the whole batch, packs it the same way and computes its own share; the loss is normalised by the
counts of the whole batch, so the number of ranks and micro-batches does not change it.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from azr_async.adapters.trainer.optimizer import adamw, flat_state, restore_state, warm_up
from azr_async.adapters.trainer.policy import (
    Chunk,
    TokenPolicy,
    can_share,
    chunk_of,
    refuse_unknown_head,
    row_tokens,
    rows_of,
)
from azr_async.adapters.trainer.ranks import lost_ranks_named
from azr_async.adapters.trainer.report import Plan, StepReport, Update, step_report
from azr_async.adapters.trainer.samples import Sample, checked_lags, credited, unrewarded
from azr_async.algorithm import losses
from azr_async.algorithm.packing import pack, waste
from azr_async.config import Config, LearnerConfig
from azr_async.errors import TrainingError
from azr_async.messages import RolloutBatch

log = logging.getLogger(__name__)


class Trainer:
    """The learner's weights and their optimizer."""

    def __init__(self, model: nn.Module, config: Config, accelerator: Accelerator, *, version: int = 0) -> None:
        self.version = version
        """Optimizer steps inside the weights."""
        self._config, self._accelerator = config, accelerator
        learner = config.learner
        self._objective = _objective(learner)
        if learner.gradient_checkpointing:
            body: Any = model
            body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # eval() keeps dropout out, as the engines do; checkpointing only works in train().
        self._policy = TokenPolicy(model.float()).train(learner.gradient_checkpointing).to(accelerator.device)
        self._optimizer = adamw(self._policy, learner)
        is_alone = accelerator.num_processes == 1
        self._parallel: Any = accelerator.prepare_model(self._policy, evaluation_mode=is_alone)
        refuse_unknown_head(self._policy, self.device)
        self._is_sharing = learner.share_prompts and can_share(self._policy, self.device)
        if learner.share_prompts and not self._is_sharing:
            log.warning("this architecture cannot share a prompt among completions; each gets a row of its own")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self._accelerator.device)

    def train(self, batch: RolloutBatch) -> StepReport:
        """One step: `learner.minibatches` updates on the batch, then the version is one higher.

        Raises TrainingError, with the weights as they were before the failing update, when the batch must not be
        trained on or when the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        lag_n = checked_lags(batch, self.version, self._config)
        parts, cells = credited(batch, self._config)
        learning_rate = warm_up(self._optimizer, self._config.learner, self.version)
        plans = [self._plan(part) for part in parts]
        proximal = [self._recomputed(plan.chunks) for plan in plans]
        with lost_ranks_named(self._accelerator):
            updates = [self._update(plan.chunks, logp) for plan, logp in zip(plans, proximal, strict=True)]
        self.version += 1
        return step_report(
            plans,
            updates,
            lag_n,
            cells,
            version=self.version,
            learning_rate=learning_rate,
            trained_tokens=sum(sample.trained_tokens for part in parts for sample in part),
            seconds=time.perf_counter() - started,
        )

    def score(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Log-probabilities of every token but the first of each sequence, joined; nats, temperature 1."""
        with torch.no_grad():
            logp_N, _ = self._policy(chunk_of([[unrewarded(ids)] for ids in sequences], self.device))
        return np.asarray(logp_N.float().cpu().numpy())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights in `model.precision` under the names of a checkpoint; tied ones once."""
        precision = getattr(torch, self._config.model.precision)
        for name, parameter in self._policy.model.named_parameters():
            yield name, parameter.detach().to(precision)

    def optimizer_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for the next step to be the same; empty before the first step."""
        return flat_state(self._optimizer, self._policy.model)

    def load_optimizer_state(self, flat: Mapping[str, Tensor]) -> None:
        """Take up `optimizer_state` again. Raises TrainingError when it is that of another model."""
        restore_state(self._optimizer, self._policy.model, flat)

    def _plan(self, samples: Sequence[Sample]) -> Plan:
        learner = self._config.learner
        busy = [sample for sample in samples if learner.entropy_weight or not sample.is_idle]
        rows = rows_of(busy, learner.microbatch_tokens if self._is_sharing else 0)
        lengths = [row_tokens(row) for row in rows]
        plan = pack(lengths, limit_tokens=learner.microbatch_tokens, ranks=self._accelerator.num_processes)
        mine = plan[self._accelerator.process_index]
        chunks = [chunk_of([rows[member] for member in microbatch.members], self.device) for microbatch in mine]
        # A rank without work still has to take part in the reduction of the gradients.
        idle = [unrewarded(np.zeros(2, np.int32))]
        return Plan(
            chunks=chunks or [chunk_of([idle], self.device)],
            samples=len(busy),
            tokens=sum(microbatch.padded_tokens for microbatches in plan for microbatch in microbatches),
            padding=waste(plan, lengths),
        )

    def _recomputed(self, chunks: Sequence[Chunk]) -> list[Tensor | None]:
        if self._config.learner.proximal != "recomputed":
            return [None] * len(chunks)
        with torch.no_grad():
            return [self._policy(chunk)[0] for chunk in chunks]

    def _update(self, chunks: Sequence[Chunk], proximal: Sequence[Tensor | None]) -> Update:
        sums, max_ratio = [], []
        for chunk, recomputed_N in zip(chunks, proximal, strict=True):
            is_last = chunk is chunks[-1]
            with nullcontext() if is_last else self._accelerator.no_sync(self._parallel):
                chunk_sums, chunk_max = self._accumulate(chunk, recomputed_N)
            sums.append(chunk_sums)
            max_ratio.append(chunk_max)
        total, largest = torch.stack(sums).sum(0), torch.stack(max_ratio).max()
        if self._accelerator.num_processes > 1:
            distributed.all_reduce(total)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        norm = nn.utils.clip_grad_norm_(self._policy.parameters(), self._config.learner.clip_norm).item()
        loss, entropy, *measured = total.tolist()
        if not math.isfinite(norm) or not math.isfinite(loss):
            self._optimizer.zero_grad()
            raise TrainingError(
                f"step {self.version + 1}: loss {loss}, gradient norm {norm}. The weights were left as they are. "
                "Resume from the last checkpoint with a smaller learner.learning_rate."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        named = dict(zip(losses.MEASURES, measured, strict=True))
        return Update(loss=loss, entropy=entropy, measures=named, max_ratio=largest.item(), grad_norm=norm)

    def _accumulate(self, chunk: Chunk, recomputed_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch; its [2 + MEASURES] sums and its largest ratio."""
        learner = self._config.learner
        logp_N, entropy_N = self._parallel(chunk, with_entropy=learner.entropy_weight > 0)
        tokens = losses.TokenBatch(
            behavior_logp=chunk.behavior_logp_N,
            proximal_logp=losses.proximal_logp(
                learner.proximal,
                logp=logp_N,
                behavior_logp=chunk.behavior_logp_N,
                recomputed_logp=recomputed_N,
                version=self.version,
                token_version=chunk.token_version_N,
            ),
            advantage=chunk.advantage_N,
            weight=chunk.weight_N,
            is_trained=chunk.weight_N != 0,
        )
        loss, is_cut_N = losses.surrogate_loss(logp_N, tokens, self._objective)
        if learner.entropy_weight:
            loss = loss - learner.entropy_weight * (chunk.weight_N * entropy_N).sum()
        # DDP averages over the ranks; the loss is a sum over them.
        self._accelerator.backward(loss * self._accelerator.num_processes)
        sums, largest = losses.measures(logp_N, chunk.behavior_logp_N, is_cut_N, tokens.is_trained)
        heads = torch.stack(
            [loss.detach().double(), torch.where(tokens.is_trained, entropy_N.detach(), 0.0).double().sum()]
        )
        return torch.cat([heads, sums]), largest


def _objective(learner: LearnerConfig) -> losses.Objective:
    return losses.Objective(
        name=learner.objective,
        clip_low=learner.clip_low,
        clip_high=learner.clip_high,
        dual_clip=learner.dual_clip,
        ratio_cap=learner.ratio_cap,
        ratio_floor=learner.ratio_floor,
    )
