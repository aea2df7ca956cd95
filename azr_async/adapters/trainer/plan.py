"""Which samples this rank computes in which micro-batch, and in which layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from azr_async.adapters.trainer.chunks import Chunk, chunk_of, packed_chunk_of, row_tokens, rows_of
from azr_async.adapters.trainer.report import Plan
from azr_async.adapters.trainer.samples import Sample, unrewarded
from azr_async.algorithm.bins import Cost, attention_cost, balanced_bins, waiting_share
from azr_async.algorithm.packing import SHARED_ROW_TOKENS, pack, waste
from azr_async.config import LearnerConfig

_NOTHING: Final = unrewarded(np.zeros(2, np.int32))
"""To be computed where there is nothing else: it weighs nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """How a batch is cut; the same on every rank but for `rank`."""

    learner: LearnerConfig
    device: torch.device
    rank: int
    ranks: int
    cost: Cost
    can_share: bool
    can_pack: bool

    def plan(self, samples: Sequence[Sample]) -> Plan:
        """Micro-batches of the samples that move the weights; every rank has equally many, at least one."""
        entropy_weight = self.learner.entropy_weight
        busy = [sample for sample in samples if sample.moves_weights(entropy_weight=entropy_weight)]
        return self._packed(busy) if self._is_packed(busy) else self._rows(busy)

    def _is_packed(self, samples: Sequence[Sample]) -> bool:
        """Short sequences are quicker side by side, with the prompts that they share computed once."""
        longest = max((len(sample.token_ids) for sample in samples), default=0)
        is_wanted = self.learner.layout == "packed" or (self.learner.layout == "auto" and longest > SHARED_ROW_TOKENS)
        return self.can_pack and is_wanted

    def _packed(self, samples: Sequence[Sample]) -> Plan:
        lengths = [len(sample.token_ids) for sample in samples]
        cost_n = self.cost.of(lengths)
        limit_tokens = self.learner.microbatch_tokens
        plan = balanced_bins(lengths, limit_tokens=limit_tokens, ranks=self.ranks, cost=self.cost)
        chunks = [
            packed_chunk_of([samples[member] for member in members] or [_NOTHING], self.device)
            for members in plan[self.rank] or [()]
        ]
        return Plan(
            chunks=chunks,
            samples=len(samples),
            tokens=sum(lengths),
            padding=0.0,
            idle=waiting_share([[cost_n[list(members)].sum() for members in bins] for bins in plan]),
        )

    def _rows(self, samples: Sequence[Sample]) -> Plan:
        limit_tokens = self.learner.microbatch_tokens
        rows = rows_of(samples, limit_tokens if self.can_share else 0)
        lengths = [row_tokens(row) for row in rows]
        plan = pack(lengths, limit_tokens=limit_tokens, ranks=self.ranks)
        rounds = max(1, *map(len, plan))
        chunks: list[Chunk] = [
            chunk_of([rows[member] for member in microbatch.members], self.device) for microbatch in plan[self.rank]
        ]
        # A rank without work still has to take part in what the ranks do together.
        chunks += [chunk_of([[_NOTHING]], self.device)] * (rounds - len(chunks))
        loads = [[microbatch.padded_tokens for microbatch in microbatches] for microbatches in plan]
        return Plan(
            chunks=chunks,
            samples=len(samples),
            tokens=sum(map(sum, loads)),
            padding=waste(plan, lengths),
            idle=waiting_share(loads),
        )


def cost_of(model: nn.Module) -> Cost:
    """What attention adds to the work on a token of this model; nothing when its configuration does not say."""
    body: Any = model
    config = body.config.get_text_config()
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return Cost()
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = body.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in body.parameters()) - embedding
    return attention_cost(layers=layers, attention_width=heads * head_width, weights=weights)
