"""What the learner is compared with: batches of random rollouts, and training steps in transformers and torch alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from azr_async.algorithm.bins import balanced_bins
from azr_async.algorithm.packing import pack
from azr_async.config import Config
from azr_async.messages import CELLS, Rollout, RolloutBatch

IGNORED: Final = -100


@dataclass(frozen=True)
class Profile:
    """The mixture of a batch; lengths are drawn evenly between shortest and longest."""

    samples: int
    attempts: int
    """At each prompt."""
    prompt_tokens: tuple[int, int]
    completion_tokens: tuple[int, int]


PROFILES: Final = {
    "starter": Profile(312, 8, (15, 40), (6, 30)),
    "medium": Profile(12, 1, (100, 400), (50, 1000)),
    "paper": Profile(384, 1, (300, 6144), (200, 8096)),
}

WAYS: Final = {"padded": False, "packed": False, "padded, lean": True, "packed, lean": True}
"""Layouts of a plain step, and whether it is lean: then it runs the output layer on trained tokens only."""


def random_batch(profile: Profile, version: int, vocabulary: int) -> RolloutBatch:
    """Rollouts of random tokens with the lengths of the profile, on policy for a model that knows nothing."""
    generator = np.random.default_rng(version)
    rollouts: list[Rollout] = []
    for number in range(profile.samples):
        if number % profile.attempts == 0:
            length = int(generator.integers(*profile.prompt_tokens, endpoint=True))
            prompt_ids = generator.integers(0, vocabulary, length, dtype=np.int32)
        completion = int(generator.integers(*profile.completion_tokens, endpoint=True))
        role, task = CELLS[number * len(CELLS) // profile.samples]
        ids = np.concatenate([prompt_ids, generator.integers(0, vocabulary, completion, dtype=np.int32)])
        is_prompt = np.arange(len(ids)) < length
        rollouts.append(
            Rollout(
                rollout_id=number,
                group_id=number // profile.attempts,
                role=role,
                task=task,
                token_ids=ids,
                behavior_logp=np.where(is_prompt, 0.0, -np.log(vocabulary)).astype(np.float32),
                token_version=np.where(is_prompt, -1, version).astype(np.int32),
                reward=float(generator.normal()),
            )
        )
    return RolloutBatch(version=version, rollouts=tuple(rollouts))


def plain_step(
    model: PreTrainedModel, config: Config, way: str, accelerator: Accelerator
) -> Callable[[RolloutBatch], None]:
    """A step as one would write it: cross-entropy of the completions' tokens, clipping, AdamW; micro-batches are cut
    as the learner cuts them."""
    learner, device = config.learner, accelerator.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learner.learning_rate, betas=learner.betas, fused=True)
    if learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(learner.gradient_checkpointing)
    is_packed, is_lean = way.startswith("packed"), WAYS[way]

    def step(batch: RolloutBatch) -> None:
        trained = sum(len(rollout.token_ids) - rollout.prompt_length for rollout in batch.rollouts)
        for chosen in _members(batch, learner.microbatch_tokens, is_packed=is_packed):
            inputs, targets_BT = _inputs([batch.rollouts[n] for n in chosen], device, is_packed=is_packed)
            with torch.autocast(device.type, torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"):
                logits_NV, target_N = (_lean if is_lean else _whole)(model, inputs, targets_BT)
            loss = functional.cross_entropy(logits_NV.float(), target_N, reduction="sum", ignore_index=IGNORED)
            accelerator.backward(loss / trained)
        nn.utils.clip_grad_norm_(model.parameters(), learner.clip_norm).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _members(batch: RolloutBatch, limit_tokens: int, *, is_packed: bool) -> list[tuple[int, ...]]:
    lengths = [len(rollout.token_ids) for rollout in batch.rollouts]
    if is_packed:
        return list(balanced_bins(lengths, limit_tokens=limit_tokens)[0])
    return [microbatch.members for microbatch in pack(lengths, limit_tokens=limit_tokens)[0]]


def _whole(model: PreTrainedModel, inputs: dict[str, Tensor], targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    return model(**inputs, use_cache=False).logits.flatten(0, 1), targets_BT.flatten()


def _lean(model: PreTrainedModel, inputs: dict[str, Tensor], targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    is_trained_BT = targets_BT != IGNORED
    hidden_BTH = model.base_model(**inputs, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden_BTH[is_trained_BT]), targets_BT[is_trained_BT]


def _inputs(rollouts: Sequence[Rollout], device: torch.device, *, is_packed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the model, and [B, T] the token that follows each one, where it is trained."""
    ids = [torch.from_numpy(rollout.token_ids.astype(np.int64)) for rollout in rollouts]
    targets = []
    for rollout, sequence in zip(rollouts, ids, strict=True):
        target = torch.full_like(sequence, IGNORED)
        target[rollout.prompt_length - 1 : -1] = sequence[rollout.prompt_length :]
        targets.append(target)
    if not is_packed:
        pad = nn.utils.rnn.pad_sequence
        return {"input_ids": pad(ids, True).to(device)}, pad(targets, True, IGNORED).to(device)
    # Positions that begin anew tell transformers where a sequence starts.
    positions = torch.cat([torch.arange(len(sequence)) for sequence in ids])
    inputs = {"input_ids": torch.cat(ids)[None].to(device), "position_ids": positions[None].to(device)}
    return inputs, torch.cat(targets)[None].to(device)
