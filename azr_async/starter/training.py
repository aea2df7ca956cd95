"""Makes the starter's model: a Llama of 0.34 M parameters, pretrained first on clean, then on noisy conversations."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from azr_async.messages import Cell
from azr_async.starter.corpus import Example, random_example

_BATCH: Final = 32
_BATCHES_PER_POOL: Final = 8
"""Examples are drawn by the pool and sorted by length, so that batches need little padding."""
_WARM_UP_STEPS: Final = 50
_LAST_LEARNING_RATE_SHARE: Final = 0.02
_CELL_WEIGHTS: Final[dict[Cell, float]] = {
    ("propose", "deduction"): 0.3,
    ("propose", "abduction"): 0.3,
    ("propose", "induction"): 0.3,
    ("solve", "deduction"): 2.0,
    ("solve", "abduction"): 1.0,
    ("solve", "induction"): 1.0,
}
"""Proposals have many tokens and are easy; a deduction answer has few and is hard."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of training; the learning rate falls linearly over it."""

    name: str
    steps: int
    learning_rate: float
    wrong_share: float


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A freshly drawn model.

    Heads have 32 dimensions: CPU attention kernels of serving engines refuse smaller ones. The type is Llama because
    transformers gives folders of some other types, Qwen2 among them, that type's own tokenizer whatever they hold.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=288,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, *, seed: int) -> Iterator[float]:
    """Train in place; yields the loss (nats per answer token, weighted by cell) after each step.

    The number of steps is fixed and chance comes from `seed` alone, so one thread of one machine repeats it exactly.
    """
    random = Random(f"{seed} {phase.name}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    batches = _batches(random, tokenizer, phase.wrong_share)
    for step in range(phase.steps):
        decay = max(_LAST_LEARNING_RATE_SHARE, 1.0 - step / phase.steps)
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * decay * min(1.0, (step + 1) / _WARM_UP_STEPS)
        token_ids_BT, weight_BT = next(batches)
        optimizer.zero_grad()
        loss = _loss(model, token_ids_BT, weight_BT)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
    model.eval()


def _loss(model: LlamaForCausalLM, token_ids_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Cross-entropy over the answers' tokens, averaged with `weight_BT` (0 on prompts and padding). []"""
    # Padding is on the right and attention is causal, so no mask is needed.
    logits_BTV = model(input_ids=token_ids_BT, use_cache=False).logits[:, :-1]
    losses_BT = cross_entropy(logits_BTV.transpose(1, 2), token_ids_BT[:, 1:], reduction="none")
    return (losses_BT * weight_BT[:, 1:]).sum() / weight_BT.sum()


def _batches(random: Random, tokenizer: PreTrainedTokenizerFast, wrong_share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless padded batches of token ids [B, T] and loss weights [B, T]."""
    while True:
        pool = [random_example(random, wrong_share=wrong_share) for _ in range(_BATCH * _BATCHES_PER_POOL)]
        rows = sorted(_rows(pool, tokenizer), key=lambda row: len(row[0]))
        batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        random.shuffle(batches)
        for batch in batches:
            yield _padded(batch, tokenizer.pad_token_id)


def _rows(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[float]]]:
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = tokenizer([example.answer + tokenizer.eos_token for example in examples])["input_ids"]
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        yield prompt + answer, [0.0] * len(prompt) + [_CELL_WEIGHTS[example.cell]] * len(answer)


def _padded(rows: list[tuple[list[int], list[float]]], pad_id: int) -> tuple[Tensor, Tensor]:
    length = max(len(token_ids) for token_ids, _ in rows)
    token_ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.long)
    weight_BT = torch.zeros(len(rows), length)
    for row, (token_ids, weights) in enumerate(rows):
        token_ids_BT[row, : len(token_ids)] = torch.tensor(token_ids)
        weight_BT[row, : len(weights)] = torch.tensor(weights)
    return token_ids_BT, weight_BT
