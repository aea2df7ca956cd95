"""The optimizer step, alike on one CPU process, on several (gloo) and on GPUs (NCCL).

Every rank is given the whole batch, packs it the same way and computes its own share; the loss is normalised by the
counts of the whole batch, so the number of ranks and micro-batches does not change it.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule

from azr_async.adapters.trainer.chunks import Chunk, chunk_of
from azr_async.adapters.trainer.optimizer import adamw, flat_state, restore_state, warm_up
from azr_async.adapters.trainer.plan import Planner, cost_of
from azr_async.adapters.trainer.policy import SAME_NATS, TokenPolicy, can_pack, can_share, find_head
from azr_async.adapters.trainer.ranks import lost_ranks_named
from azr_async.adapters.trainer.report import StepReport, Update, step_report
from azr_async.adapters.trainer.samples import checked_lags, credited, unrewarded
from azr_async.adapters.trainer.sharding import is_sharded, offloads, shard, to_host, whole
from azr_async.algorithm import losses
from azr_async.config import Config, LearnerConfig
from azr_async.errors import TrainingError
from azr_async.messages import RolloutBatch

log = logging.getLogger(__name__)


class Trainer:
    """The learner's weights and their optimizer.

    With sharded weights every method but the properties is collective: all ranks have to call it.
    """

    def __init__(self, model: nn.Module, config: Config, accelerator: Accelerator, *, version: int = 0) -> None:
        self.version = version
        """Optimizer steps inside the weights."""
        self.is_sharded = is_sharded(config, accelerator)
        """Whether each rank has a part of the weights only."""
        self._config, self._accelerator = config, accelerator
        learner = config.learner
        self._objective = _objective(learner)
        cost = cost_of(model)
        self._policy, self._parallel = _policy_of(model, config, accelerator, sharded=self.is_sharded)
        self._optimizer = adamw(self._policy, learner)
        with lost_ranks_named(accelerator):
            may_share, may_pack = _findings(self._policy, config, accelerator)
        self._reshard()
        self._planner = Planner(
            learner=learner,
            device=self.device,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            cost=cost,
            can_share=may_share,
            can_pack=may_pack,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are used."""
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
        plans = [self._planner.plan(part) for part in parts]
        with lost_ranks_named(self._accelerator):
            proximal = [self._recomputed(plan.chunks) for plan in plans]
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
        with torch.no_grad(), lost_ranks_named(self._accelerator):
            logp_N, _ = self._policy(chunk_of([[unrewarded(ids)] for ids in sequences], self.device))
        self._reshard()
        return np.asarray(logp_N.float().cpu().numpy())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights in `model.precision` under the names of a checkpoint; tied ones once.

        Sharded ones are put together one after the other: at no time does a rank have all of them.
        """
        precision = getattr(torch, self._config.model.precision)
        with lost_ranks_named(self._accelerator):
            for name, parameter in self._policy.model.named_parameters():
                yield name, whole(parameter.detach().to(precision))

    def model_state(self) -> dict[str, Tensor] | None:
        """What a checkpoint must hold of the model, in the host's memory of rank 0, elsewhere empty.

        None when the model has all of its weights itself.
        """
        if not self.is_sharded:
            return None
        model = self._policy.model
        kept = model.state_dict().keys()  # of the buffers only those that a checkpoint has
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        with lost_ranks_named(self._accelerator):
            return to_host({**dict(model.named_parameters()), **buffers}, keep=self._accelerator.is_main_process)

    def optimizer_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for the next step to be the same; empty before the first step.

        When sharded: in the host's memory of rank 0, elsewhere empty.
        """
        flat = flat_state(self._optimizer, self._policy.model)
        if not self.is_sharded:
            return flat
        with lost_ranks_named(self._accelerator):
            return to_host(flat, keep=self._accelerator.is_main_process)

    def load_optimizer_state(self, flat: Mapping[str, Tensor]) -> None:
        """Take up `optimizer_state` again, when sharded that of rank 0. Raises TrainingError for another model's."""
        with lost_ranks_named(self._accelerator):
            restore_state(self._optimizer, self._policy.model, flat)

    def _recomputed(self, chunks: Sequence[Chunk]) -> list[Tensor | None]:
        if self._config.learner.proximal != "recomputed":
            return [None] * len(chunks)
        with torch.no_grad():
            recomputed: list[Tensor | None] = [self._policy(chunk)[0] for chunk in chunks]
        self._reshard()
        return recomputed

    def _update(self, chunks: Sequence[Chunk], proximal: Sequence[Tensor | None]) -> Update:
        sums, max_ratio = [], []
        for number, (chunk, recomputed_N) in enumerate(zip(chunks, proximal, strict=True), start=1):
            with self._reducing(is_last=number == len(chunks)):
                chunk_sums, chunk_max = self._accumulate(chunk, recomputed_N)
            sums.append(chunk_sums)
            max_ratio.append(chunk_max)
        total, largest = torch.stack(sums).sum(0), torch.stack(max_ratio).max()
        if self._accelerator.num_processes > 1:
            distributed.all_reduce(total)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        norm = whole(nn.utils.clip_grad_norm_(self._policy.parameters(), self._config.learner.clip_norm)).item()
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

    def _reshard(self) -> None:
        """After a forward pass without backward: what was put together for it is let go."""
        if isinstance(self._policy, FSDPModule):
            self._policy.reshard()

    def _reducing(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Copies add up their gradients once, with the last micro-batch; parts at once, for they have no room."""
        if is_last or self.is_sharded:
            return nullcontext()
        context: AbstractContextManager[None] = self._accelerator.no_sync(self._parallel)
        return context

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
        # DDP and FSDP average over the ranks; the loss is a sum over them.
        self._accelerator.backward(loss * self._accelerator.num_processes)
        sums, largest = losses.measures(logp_N, chunk.behavior_logp_N, is_cut_N, tokens.is_trained)
        heads = torch.stack(
            [loss.detach().double(), torch.where(tokens.is_trained, entropy_N.detach(), 0.0).double().sum()]
        )
        return torch.cat([heads, sums]), largest


def _policy_of(model: nn.Module, config: Config, accelerator: Accelerator, *, sharded: bool) -> tuple[TokenPolicy, Any]:
    """The policy, and what is called in its place for the ranks to work together."""
    policy = TokenPolicy(model.float(), logits_mb=config.learner.logits_mb).eval()  # no dropout, as in the engines
    if config.learner.gradient_checkpointing:
        _recompute_layers(model)
    if sharded:
        dtype = _product_dtype(accelerator)
        with lost_ranks_named(accelerator):
            shard(policy, model, accelerator, dtype=dtype, offload=offloads(config, accelerator))
        return policy, policy
    policy = policy.to(accelerator.device)
    return policy, accelerator.prepare_model(policy, evaluation_mode=accelerator.num_processes == 1)


def _recompute_layers(model: nn.Module) -> None:
    """Layers are computed again for their gradients. Only they get the training mode that this needs, and as some of
    them drop out by themselves, all shares of what is dropped become 0."""
    body: Any = model
    if not body.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(model).__name__} cannot compute its layers again. Set learner.gradient_checkpointing to false, and "
            "lower learner.microbatch_tokens if memory runs out."
        )
    body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _findings(policy: TokenPolicy, config: Config, accelerator: Accelerator) -> tuple[bool, bool]:
    """Whether the model can share prompts in a row, and keep packed sequences apart; its head is set on the way."""
    learner, device = config.learner, torch.device(accelerator.device)
    same_nats = SAME_NATS[_product_dtype(accelerator)]
    find_head(policy, device, same_nats=same_nats)
    may_pack = learner.layout != "rows" and can_pack(policy, device, same_nats=same_nats)
    if learner.layout != "rows" and not may_pack:
        log.warning("this architecture cannot keep packed sequences apart; they go side by side, with padding")
    may_share = learner.share_prompts and can_share(policy, device, same_nats=same_nats)
    if learner.share_prompts and not may_share:
        log.warning("this architecture cannot share a prompt among completions; each gets a row of its own")
    return may_share, may_pack


def _product_dtype(accelerator: Accelerator) -> torch.dtype:
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def _objective(learner: LearnerConfig) -> losses.Objective:
    return losses.Objective(
        name=learner.objective,
        clip_low=learner.clip_low,
        clip_high=learner.clip_high,
        dual_clip=learner.dual_clip,
        ratio_cap=learner.ratio_cap,
        ratio_floor=learner.ratio_floor,
    )
