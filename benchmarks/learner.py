"""How fast and how lean is an optimizer step of the learner, next to a plain transformers step on the same tokens?

speed    `Trainer.train` and a plain loop (the model's own forward, cross-entropy, backward, clipping, AdamW) take turns
         on the same samples; the plain loop once with the samples one after the other (positions begin anew, so that
         transformers keeps them apart), once side by side with padding. Trained are the tokens of the completions.
packing  what padding and waiting for the slowest rank cost, on mixtures of lengths like those of Absolute Zero.
memory   the peak of a forward and backward pass at a vocabulary of 152 thousand, logits at once and in blocks, each in
         a process of its own.

    python benchmarks/learner.py --output benchmarks/results/learner.json
    python benchmarks/learner.py --parts speed --device cuda --model Qwen/Qwen2.5-3B --profiles paper --peak-tflops 989
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from whole_runs import write_json

from azr_async.adapters.models import load_model
from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.adapters.trainer.chunks import packed_chunk_of
from azr_async.adapters.trainer.plan import cost_of
from azr_async.adapters.trainer.policy import TokenPolicy, can_pack
from azr_async.adapters.trainer.samples import unrewarded
from azr_async.algorithm.bins import attention_cost, balanced_bins, waiting_share
from azr_async.algorithm.packing import pack, waste
from azr_async.config import Config
from azr_async.messages import CELLS, Rollout, RolloutBatch

WORDS: Final = 151_936
"""Vocabulary of Qwen2.5."""
PROFILES: Final = {"starter": (104, 8, (15, 40), (6, 30)), "medium": (12, 1, (100, 600), (50, 1200)),
                   "paper": (96, 1, (300, 6144), (200, 8096))}  # fmt: skip
"""Samples, attempts at each prompt, shortest and longest prompt, and completion."""
EVERYTHING_MB: Final = 2**30


@dataclass(frozen=True)
class Measured:
    """One step of one way to take it."""

    wall_seconds: float
    cpu_seconds: float


def main() -> None:
    """Measure what was asked for, print it and write it down."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe is not None:
        logits, entropy = arguments.probe
        print(peak_bytes(logits, entropy, arguments.tokens, arguments.vocabulary, arguments.device))
        return
    results: dict[str, Any] = {}
    console = Console(width=120)
    if "speed" in arguments.parts:
        results["speed"] = [row for profile in arguments.profiles for row in speed(profile, arguments)]
        console.print(_table("speed", results["speed"]))
    if "packing" in arguments.parts:
        results["packing"] = packing()
        console.print(_table("packing", results["packing"]))
    if "memory" in arguments.parts:
        results["memory"] = memory(arguments)
        console.print(_table("memory", results["memory"]))
    write_json(arguments.output, "learner", results)


# ---------------------------------------------------------------- speed


def speed(profile: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of the learner's step and of the plain ones, by turns."""
    is_cuda = arguments.device == "cuda"
    config = Config.model_validate(
        {
            "placement": {"inference_gpus": 1, "train_gpus": 1} if is_cuda else {},
            "model": {"precision": "bfloat16" if is_cuda else "float32"},
            "learner": {
                "microbatch_tokens": arguments.microbatch_tokens,
                "gradient_checkpointing": arguments.gradient_checkpointing,
            },
        }
    )
    accelerator = connect_ranks(config)
    model, plain_model = (model_of(arguments.model, accelerator.device) for _ in range(2))
    trainer = Trainer(model, config, accelerator)
    batches = [random_batch(profile, version, model.config.vocab_size) for version in range(arguments.steps)]
    ways: dict[str, Callable[[RolloutBatch], object]] = {"learner": trainer.train}
    for layout in ("packed", "padded"):
        ways[f"plain, {layout}"] = plain_step(plain_model, config, layout, accelerator)
    measured: dict[str, list[Measured]] = {name: [] for name in ways}
    for batch in batches:
        for name, step in ways.items():
            measured[name].append(timed(partial(step, batch), is_cuda))
    tokens = float(np.mean([sum(len(r.token_ids) - r.prompt_length for r in batch.rollouts) for batch in batches]))
    rows: list[dict[str, Any]] = []
    for name, times in measured.items():
        wall = statistics.median(time.wall_seconds for time in times[1:])
        cpu = statistics.median(time.cpu_seconds for time in times[1:])
        row = {"profile": profile, "step": name, "trained_tokens_per_wall_second": tokens / wall}
        row |= {"trained_tokens_per_cpu_second": tokens / cpu}
        if arguments.peak_tflops:
            row["flops_utilisation"] = operations(batches[-1], model) / wall / arguments.peak_tflops / 1e12
        rows.append(row)
    unit = "wall" if is_cuda else "cpu"
    best = max(row[f"trained_tokens_per_{unit}_second"] for row in rows[1:])
    return [row | {"ratio_to_best_plain": row[f"trained_tokens_per_{unit}_second"] / best} for row in rows]


def model_of(path: str, device: torch.device) -> PreTrainedModel:
    """The named model, or `small`: a random Qwen2 of 2.6 million parameters, half of them in the embedding."""
    if path != "small":
        return load_model(path, "float32", device)[0]
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=8192,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(shape).to(device).eval()


def random_batch(profile: str, version: int, vocabulary: int) -> RolloutBatch:
    """Rollouts of random tokens with the lengths of the profile."""
    count, attempts, prompt_span, completion_span = PROFILES[profile]
    generator = np.random.default_rng(version)
    rollouts: list[Rollout] = []
    for number in range(count):
        if number % attempts == 0:
            length = int(generator.integers(*prompt_span, endpoint=True))
            prompt_ids = generator.integers(0, vocabulary, length, dtype=np.int32)
        completion = int(generator.integers(*completion_span, endpoint=True))
        role, task = CELLS[number * len(CELLS) // count]
        ids = np.concatenate([prompt_ids, generator.integers(0, vocabulary, completion, dtype=np.int32)])
        rollouts.append(
            Rollout(
                rollout_id=number,
                group_id=number // attempts,
                role=role,
                task=task,
                token_ids=ids,
                behavior_logp=np.where(np.arange(len(ids)) < length, 0.0, -np.log(vocabulary)).astype(np.float32),
                token_version=np.where(np.arange(len(ids)) < length, -1, version).astype(np.int32),
                reward=float(generator.normal()),
            )
        )
    return RolloutBatch(version=version, rollouts=tuple(rollouts))


def plain_step(
    model: PreTrainedModel, config: Config, layout: str, accelerator: Accelerator
) -> Callable[[RolloutBatch], None]:
    """A training step as one would write it with transformers and torch alone."""
    learner, device = config.learner, accelerator.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learner.learning_rate, betas=learner.betas, fused=True)
    if learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(learner.gradient_checkpointing)
    is_bfloat16 = accelerator.mixed_precision == "bf16"

    def step(batch: RolloutBatch) -> None:
        lengths = [len(rollout.token_ids) for rollout in batch.rollouts]
        limit = learner.microbatch_tokens
        if layout == "packed":
            members = list(balanced_bins(lengths, limit_tokens=limit)[0])
        else:
            members = [microbatch.members for microbatch in pack(lengths, limit_tokens=limit)[0]]
        trained = sum(len(rollout.token_ids) - rollout.prompt_length for rollout in batch.rollouts)
        for chosen in members:
            ids, positions, targets = _plain_inputs([batch.rollouts[n] for n in chosen], layout, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / trained
            accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), learner.clip_norm).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain_inputs(
    rollouts: Sequence[Rollout], layout: str, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Token ids, positions and targets, -100 where nothing is trained."""
    ids = [torch.from_numpy(rollout.token_ids.astype(np.int64)) for rollout in rollouts]
    targets = []
    for rollout, sequence in zip(rollouts, ids, strict=True):
        target = torch.full_like(sequence, -100)
        target[rollout.prompt_length - 1 : -1] = sequence[rollout.prompt_length :]
        targets.append(target)
    if layout == "padded":
        pad = nn.utils.rnn.pad_sequence
        return pad(ids, True).to(device), None, pad(targets, True, -100).to(device)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in ids])
    return torch.cat(ids)[None].to(device), positions[None].to(device), torch.cat(targets)[None].to(device)


def timed(work: Callable[[], object], is_cuda: bool) -> Measured:
    """What it costs, until the device has done it."""
    cpu_seconds, wall_seconds = time.process_time(), time.perf_counter()
    work()
    if is_cuda:
        torch.cuda.synchronize()
    return Measured(time.perf_counter() - wall_seconds, time.process_time() - cpu_seconds)


def operations(batch: RolloutBatch, model: PreTrainedModel) -> float:
    """Useful ones of a step: three times forward; the head on trained tokens, attention on half of the square."""
    whole: Any = model
    head = int(whole.get_output_embeddings().weight.numel())
    weights = sum(parameter.numel() for parameter in model.parameters())
    weights -= int(whole.get_input_embeddings().weight.numel())
    body = weights - (0 if whole.config.tie_word_embeddings else head)
    lengths = np.array([len(rollout.token_ids) for rollout in batch.rollouts])
    trained = sum(len(rollout.token_ids) - rollout.prompt_length for rollout in batch.rollouts)
    quadratic = cost_of(model).quadratic * weights * float((lengths.astype(np.float64) ** 2).sum())
    total: float = body * float(lengths.sum()) + quadratic + head * trained
    return 6 * total


# ---------------------------------------------------------------- packing


def packing() -> list[dict[str, Any]]:
    """Shares of padding and of waiting, for the shape of a 7B model and 16 thousand tokens a micro-batch."""
    cost = attention_cost(layers=28, attention_width=3584, weights=7_070_000_000)
    generator = np.random.default_rng(0)
    skewed = generator.lognormal(6.8, 0.7, 384).clip(200, 6144) + generator.lognormal(6.5, 1.0, 384).clip(30, 8096)
    mixtures = {
        "many short, few long": skewed.astype(int).tolist(),
        "6 k prompts, 2 k to 8 k": (6144 + generator.integers(2000, 8097, 384)).tolist(),
    }
    rows = []
    for mixture, lengths in mixtures.items():
        for ranks in (1, 2, 4, 8):
            plan = balanced_bins(lengths, limit_tokens=16_384, ranks=ranks, cost=cost)
            costs = cost.of(lengths)
            side_by_side = pack(lengths, limit_tokens=16_384, ranks=ranks)
            loads = [[float(cost.of([batch.width])[0]) * len(batch.members) for batch in part] for part in side_by_side]
            rows += [
                {
                    "lengths": mixture,
                    "ranks": ranks,
                    "layout": "packed",
                    "padding": 0.0,
                    "waiting": waiting_share([[costs[list(one)].sum() for one in bins] for bins in plan]),
                },
                {
                    "lengths": mixture,
                    "ranks": ranks,
                    "layout": "rows",
                    "padding": waste(side_by_side, lengths),
                    "waiting": waiting_share(loads),
                },
            ]
    return rows


# ---------------------------------------------------------------- memory


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks above what the model itself takes."""
    rows = []
    for entropy in ("no", "yes"):
        peaks = []
        for logits in ("at once", "in blocks"):
            command = [sys.executable, __file__, "--probe", logits, entropy, "--tokens", str(arguments.tokens)]
            command += ["--vocabulary", str(arguments.vocabulary), "--device", arguments.device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout))
            row = {"logits": logits, "entropy": entropy, "tokens": arguments.tokens, "peak_mb": peaks[-1] / 2**20}
            rows.append(row | {"share": peaks[-1] / peaks[0]})
    return rows


def peak_bytes(logits: str, entropy: str, tokens: int, vocabulary: int, device_name: str) -> int:
    """Most memory that a pass over one packed sequence took, beyond what was there before it."""
    device = torch.device(device_name)
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


# ----------------------------------------------------------------


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["speed", "packing", "memory"])
    parser.add_argument("--model", default="small", help="`small`, `starter`, a folder or a hub id")
    parser.add_argument("--profiles", nargs="+", default=["starter", "medium"], choices=list(PROFILES))
    parser.add_argument("--steps", type=int, default=5, help="the first is not counted")
    parser.add_argument("--microbatch-tokens", type=int, default=Config().learner.microbatch_tokens)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for the share that is used")
    parser.add_argument("--tokens", type=int, default=2048, help="for the memory")
    parser.add_argument("--vocabulary", type=int, default=WORDS, help="for the memory")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
