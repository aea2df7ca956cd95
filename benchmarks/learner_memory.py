"""The peak of a forward and backward pass at a vocabulary of 152 thousand: logits at once, and in blocks.

Each pass has a process of its own, because the peak of a process never falls.

    python benchmarks/learner.py --parts memory
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from azr_async.adapters.trainer.chunks import packed_chunk_of
from azr_async.adapters.trainer.policy import TokenPolicy, can_pack
from azr_async.adapters.trainer.samples import unrewarded
from azr_async.config import Config

WORDS: Final = 151_936
"""Vocabulary of Qwen2.5."""
EVERYTHING_MB: Final = 2**30


def memory(tokens: int, vocabulary: int, device: str) -> list[dict[str, Any]]:
    """Peaks above what the model itself takes."""
    rows = []
    for entropy in ("no", "yes"):
        peaks = []
        for logits in ("at once", "in blocks"):
            command = [sys.executable, __file__, logits, entropy, str(tokens), str(vocabulary), device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout))
            row = {"logits": logits, "entropy": entropy, "tokens": tokens, "peak_mb": peaks[-1] / 2**20}
            rows.append(row | {"share": peaks[-1] / peaks[0]})
    return rows


def peak_bytes(logits: str, entropy: str, tokens: int, vocabulary: int, device: torch.device) -> int:
    """Most memory that a pass over one packed sequence took, beyond what was there before it."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    logits_mb = EVERYTHING_MB if logits == "at once" else Config().learner.logits_mb
    policy = TokenPolicy(Qwen2ForCausalLM(shape).to(device), logits_mb=logits_mb)
    assert can_pack(policy, device, same_nats=0.05)
    chunk = packed_chunk_of([unrewarded(np.arange(tokens, dtype=np.int32) % vocabulary)], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _resident_bytes(device)
    logp_N, entropy_N = policy(chunk, with_entropy=entropy == "yes")
    (logp_N.mean() + entropy_N.mean()).backward()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _probe() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logits", choices=["at once", "in blocks"])
    parser.add_argument("entropy", choices=["no", "yes"])
    parser.add_argument("tokens", type=int)
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("device", type=torch.device)
    torch.set_num_threads(1)
    print(peak_bytes(**vars(parser.parse_args())))


if __name__ == "__main__":
    _probe()
