"""Small models with random weights, and a tokenizer that knows every byte: real parts for the engine's tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from azr_async.messages import Completion, GenerateJob, Prompt

VOCABULARY = 258
PAD, END = 0, 1


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after `<pad>` and `<eos>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<eos>": END} | {symbol: n + 2 for n, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def random_model(kind: str, seed: int = 0, **changes: int) -> PreTrainedModel:
    """`qwen2-tied`, `qwen2-untied`, `llama-tied` or `llama-untied`: two layers, grouped-query attention."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind.endswith("-tied"),
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    } | changes
    if kind.startswith("qwen2"):
        return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def save_random_model(folder: Path, kind: str = "qwen2-tied", seed: int = 0, **changes: int) -> None:
    """A model folder as Hugging Face writes it."""
    random_model(kind, seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def a_job(job_id: int = 0, text: str = "hello", **changes: object) -> GenerateJob:
    """A job of one sample and 12 tokens, unless changed."""
    settings: dict[str, object] = {
        "prompt": Prompt(text=text),
        "samples": 1,
        "priority": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 12,
        "seed": job_id,
    }
    return GenerateJob(job_id=job_id, **(settings | changes))  # type: ignore[arg-type]


def full_pass_logp(model: PreTrainedModel, completion: Completion, temperature: float = 1.0) -> NDArray[np.float32]:
    """[T] what one plain forward pass over the whole text says about the completion's tokens."""
    ids = np.concatenate([completion.prompt_ids, completion.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits_TV = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].float() / temperature
    logp_TV = torch.log_softmax(logits_TV, -1).numpy()
    every = np.take_along_axis(logp_TV, ids[1:, None], -1)[:, 0]
    return every[len(completion.prompt_ids) - 1 :]
