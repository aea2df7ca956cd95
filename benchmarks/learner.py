"""How fast and how lean is an optimizer step of the learner, next to a plain transformers step on the same tokens?

speed     `Trainer.train` and plain training loops (forward, cross-entropy, backward, clipping, AdamW) take turns on the
          same samples, each with a model of its own of the same weights, threads and precision. Plain ones lay the
          sequences side by side with padding, or one after the other (positions begin anew, so that transformers keeps
          them apart); each as the model comes, and lean, with logits of the trained tokens only. Every round gives one
          ratio of times; the median counts, its extremes tell the spread. Trained tokens are those of completions.
planning  what decoding, crediting, cutting and laying out a batch takes, which happens between two steps.
packing   what padding and waiting for the slowest rank cost, on mixtures of lengths like those of Absolute Zero.
memory    the peak of a forward and backward pass at a vocabulary of 152 thousand, logits at once and in blocks.

    python benchmarks/learner.py --output benchmarks/results/learner.json
    python benchmarks/learner.py --parts speed --device cuda --model Qwen/Qwen2.5-3B --profiles paper --peak-tflops 989

With --output, other parts, models and profiles that were measured into the same file before stay in it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from learner_memory import WORDS, memory
from plain_step import PROFILES, WAYS, Profile, plain_step, random_batch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from whole_runs import write_json

from azr_async.adapters.channels import wire
from azr_async.adapters.models import load_model
from azr_async.adapters.trainer import Trainer, connect_ranks
from azr_async.adapters.trainer.plan import Planner, cost_of
from azr_async.adapters.trainer.samples import credited
from azr_async.algorithm.bins import attention_cost, balanced_bins, waiting_share
from azr_async.algorithm.packing import pack, waste
from azr_async.config import Config
from azr_async.messages import RolloutBatch

BATCH_MB: Final = 1024
"""Largest message of the planning part."""


def main() -> None:
    """Measure what was asked for, print it and write it down."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    if "speed" in arguments.parts:
        for name in arguments.profiles:
            results[f"speed: {arguments.model} model, {name} lengths"] = speed(PROFILES[name], arguments)
    if "planning" in arguments.parts:
        results["planning"] = planning()
    if "packing" in arguments.parts:
        results["packing"] = packing()
    if "memory" in arguments.parts:
        results["memory"] = memory(arguments.tokens, arguments.vocabulary, arguments.device)
    for title, rows in results.items():
        Console(width=120).print(_table(title, rows))
    if arguments.output is not None and arguments.output.exists():
        results = json.loads(arguments.output.read_text(encoding="utf-8"))["results"] | results
    write_json(arguments.output, "learner", results)


# ---------------------------------------------------------------- speed


def speed(profile: Profile, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Trained tokens a second of the learner and of each plain way, and how they compare round by round."""
    is_cuda = arguments.device == "cuda"
    config = config_of(arguments, share_prompts=True)
    accelerator = connect_ranks(config)
    load = partial(model_of, arguments.model, accelerator.device)
    model = load()
    steps: dict[str, Callable[[RolloutBatch], object]] = {"learner": Trainer(model, config, accelerator).train}
    if profile.attempts > 1:
        alone = config_of(arguments, share_prompts=False)
        steps["learner, each prompt computed"] = Trainer(load(), alone, accelerator).train
    for way in arguments.ways:
        steps[f"plain, {way}"] = plain_step(load(), config, way, accelerator)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    tokens = []
    for version in range(1 + arguments.rounds):
        batch = random_batch(profile, version, model.config.vocab_size)
        tokens.append(sum(len(rollout.token_ids) - rollout.prompt_length for rollout in batch.rollouts))
        for name, step in steps.items():
            seconds[name].append(timed(partial(step, batch), is_cuda))
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        # The first round warms up.
        rates = [count / time for count, time in zip(tokens[1:], times[1:], strict=True)]
        ratios = [theirs / ours for theirs, ours in zip(times[1:], seconds["learner"][1:], strict=True)]
        row: dict[str, Any] = {"step": name, "rounds": len(rates), "trained_tokens_per_second": median(rates)}
        row |= {"learner_is_faster_by": median(ratios), "least": min(ratios), "most": max(ratios)}
        if arguments.peak_tflops:
            row["flops_utilisation"] = operations(batch, model) / times[-1] / arguments.peak_tflops / 1e12
        rows.append(row)
    return rows


def config_of(arguments: argparse.Namespace, *, share_prompts: bool) -> Config:
    """One rank, with the defaults of a run but for what was asked for."""
    is_cuda = arguments.device == "cuda"
    learner = {"share_prompts": share_prompts, "gradient_checkpointing": arguments.gradient_checkpointing}
    return Config.model_validate(
        {
            "placement": {"inference_gpus": 1, "train_gpus": 1} if is_cuda else {},
            "model": {"precision": "bfloat16" if is_cuda else "float32"},
            "learner": {**learner, "microbatch_tokens": arguments.microbatch_tokens},
        }
    )


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


def timed(work: Callable[[], object], is_cuda: bool) -> float:
    """Wall seconds until the device has done it."""
    started = time.perf_counter()
    work()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


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


# ---------------------------------------------------------------- planning


def planning() -> list[dict[str, Any]]:
    """Milliseconds for a batch of the starter, and for one of the paper's lengths on one of four ranks."""
    rows = []
    for name, ranks, microbatch_tokens in (("starter", 1, 4096), ("paper", 4, 16_384)):
        config = Config.model_validate({"learner": {"microbatch_tokens": microbatch_tokens}})
        batch = random_batch(PROFILES[name], 0, 8192)
        planner = Planner(
            learner=config.learner,
            device=torch.device("cpu"),
            rank=0,
            ranks=ranks,
            cost=attention_cost(layers=28, attention_width=3584, weights=7_070_000_000),
            can_share=True,
            can_pack=True,
        )
        payload = wire.encode(batch)
        stages: dict[str, Callable[[], object]] = {
            "encode_ms": partial(wire.encode, batch),
            "decode_ms": partial(wire.decode, payload, limit_bytes=BATCH_MB * 2**20),
            "credit_ms": partial(credited, batch, config),
            "plan_ms": partial(planner.plan, credited(batch, config)[0][0]),
        }
        tokens = sum(len(rollout.token_ids) for rollout in batch.rollouts)
        took = {stage: 1000 * median([timed(work, False) for _ in range(7)]) for stage, work in stages.items()}
        rows.append({"lengths": name, "ranks": ranks, "samples": len(batch.rollouts), "tokens": tokens} | took)
    return rows


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
            side_by_side = pack(lengths, limit_tokens=16_384, ranks=ranks)
            costs = cost.of(lengths)
            packed_costs = [[float(costs[list(one)].sum()) for one in bins] for bins in plan]
            rows_costs = [[float(cost.of([one.width])[0]) * len(one.members) for one in part] for part in side_by_side]
            for layout, padding, loads in (
                ("packed", 0.0, packed_costs),
                ("rows", waste(side_by_side, lengths), rows_costs),
            ):
                row = {"lengths": mixture, "ranks": ranks, "layout": layout, "padding": padding}
                rows.append(row | {"waiting": waiting_share(loads)})
    return rows


# ----------------------------------------------------------------


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["speed", "planning", "packing", "memory"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--model", default="small", help="`small`, `starter`, a folder or a hub id")
    parser.add_argument("--profiles", nargs="+", default=["starter", "medium"], choices=list(PROFILES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="plain steps to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="one more is taken to warm up")
    parser.add_argument("--microbatch-tokens", type=int, default=Config().learner.microbatch_tokens)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for the share that is used")
    parser.add_argument("--tokens", type=int, default=2048, help="for the memory")
    parser.add_argument("--vocabulary", type=int, default=WORDS, help="for the memory")
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
