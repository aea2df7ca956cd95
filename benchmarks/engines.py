"""How fast do the engines generate, next to transformers' own `generate` on the same work?

The work: solver prompts of the starter's held-out suite, several samples each at temperature 1, until the model ends
its answer. All use the same model, one thread, as many sequences side by side; their repeats alternate. `generate`
gets its prompts sorted by length, in batches, as one would. Tokens are counted up to each answer's end token. vLLM is
there where it is installed; its processes' CPU time counts as its own.

    python benchmarks/engines.py --slots 64 256 512 --output benchmarks/results/engines.json
"""

import argparse
import asyncio
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from whole_runs import write_json

from azr_async.adapters.engines.embedded import EmbeddedEngine
from azr_async.adapters.models import load_model, model_source
from azr_async.adapters.weights.vllm_plugin import BACKEND, EXTENSION
from azr_async.algorithm.dialogue import make_dialogue
from azr_async.config import Config
from azr_async.messages import GenerateJob, Prompt
from azr_async.programs.placement import VLLM_ENVIRONMENT
from azr_async.starter.suite import STARTER_SUITE, load_suite

SAMPLES = 8
MAX_TOKENS = 48
CONTEXT_TOKENS = 256
DEADLINE_SECONDS = 300.0
"""Of one repeat in vLLM."""


@dataclass(frozen=True)
class Measured:
    """One repeat of one engine."""

    tokens: int
    cpu_seconds: float
    wall_seconds: float


def main() -> None:
    """Alternate both engines at every number of slots, print medians and ratios."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    dialogue = make_dialogue("compact")
    prompts = [dialogue.solve(problem) for problem in load_suite(STARTER_SUITE)][:: arguments.every]
    rows: list[dict[str, Any]] = []
    for slots in arguments.slots:
        with ExitStack() as opened:
            engines = {"embedded engine": embedded(slots), "transformers generate": plain_generate(slots)}
            if importlib.util.find_spec("vllm") is not None:
                engines["vllm"] = opened.enter_context(vllm(slots))
            for run_prompts in engines.values():
                run_prompts(prompts[: max(1, slots // SAMPLES)])  # warm-up
            for _, (name, run_prompts) in itertools.product(range(arguments.repeats), engines.items()):
                measured = timed(run_prompts, prompts, cpu_seconds if name == "vllm" else time.process_time)
                rows.append(
                    {
                        "engine": name,
                        "slots": slots,
                        "tokens": measured.tokens,
                        "tokens_per_cpu_second": measured.tokens / measured.cpu_seconds,
                        "tokens_per_wall_second": measured.tokens / measured.wall_seconds,
                    }
                )
    show(rows)
    write_json(arguments.output, "engines", rows)


def embedded(slots: int) -> Callable[[list[Prompt]], int]:
    """Our engine; returns how many tokens it generated for the prompts."""
    engine = EmbeddedEngine(
        *load_model("starter", "float32", "cpu"), slots=slots, context_tokens=CONTEXT_TOKENS, on_new_weights="keep"
    )

    def run(prompts: list[Prompt]) -> int:
        before = engine.generated_tokens
        for number, prompt in enumerate(prompts):
            engine.submit(a_job(number, prompt))
        while engine.has_work:
            engine.step()
        return engine.generated_tokens - before

    return run


def plain_generate(slots: int) -> Callable[[list[Prompt]], int]:
    """`model.generate` in batches of `slots` sequences; gives no log-probabilities, which would slow it down."""
    model, tokenizer = load_model("starter", "float32", "cpu")
    tokenizer.padding_side = "left"
    at_once = max(1, slots // SAMPLES)

    def run(prompts: list[Prompt]) -> int:
        texts = sorted((prompt.text for prompt in prompts), key=lambda text: len(tokenizer(text)["input_ids"]))
        tokens = 0
        for start in range(0, len(texts), at_once):
            batch = tokenizer(
                texts[start : start + at_once], return_tensors="pt", padding=True, add_special_tokens=False
            )
            with torch.inference_mode():
                ids_BT = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=MAX_TOKENS,
                    num_return_sequences=SAMPLES,
                )
            answer_BT = ids_BT[:, batch["input_ids"].shape[1] :]
            is_after_end_BT = (answer_BT == tokenizer.eos_token_id).cumsum(-1) - (
                answer_BT == tokenizer.eos_token_id
            ).int()
            tokens += int((is_after_end_BT == 0).sum())
        return tokens

    return run


@contextmanager
def vllm(slots: int) -> Iterator[Callable[[list[Prompt]], int]]:
    """vLLM as the workers use it, with processes of its own until the end of the block."""
    os.environ.update(VLLM_ENVIRONMENT)
    from azr_async.adapters.engines.vllm.opening import open_engine

    loop = asyncio.new_event_loop()
    settings = {"slots": slots, "context_tokens": CONTEXT_TOKENS, "kind": "vllm"}
    config = Config.model_validate({"engine": settings})
    engine = open_engine(model_source("starter"), config, transfer_backend=BACKEND, worker_extension=EXTENSION, seed=1)

    async def sample_all(jobs: list[GenerateJob]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*(engine.sample(job, index) for job in jobs for index in range(job.samples)))

    def run(prompts: list[Prompt]) -> int:
        before = engine.generated_tokens
        loop.run_until_complete(sample_all([a_job(number, prompt) for number, prompt in enumerate(prompts)]))
        return engine.generated_tokens - before

    async def close() -> None:
        engine.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.1)  # vLLM closes its sockets in the loop; one left open blocks the next engine for ever

    try:
        yield run
    finally:
        loop.run_until_complete(close())
        loop.close()


def a_job(number: int, prompt: Prompt) -> GenerateJob:
    """All samples of one prompt."""
    return GenerateJob(
        job_id=number,
        prompt=prompt,
        samples=SAMPLES,
        priority=number,
        temperature=1.0,
        top_p=1.0,
        max_tokens=MAX_TOKENS,
        seed=number,
    )


def timed(run: Callable[[list[Prompt]], int], prompts: list[Prompt], cpu_clock: Callable[[], float]) -> Measured:
    """Tokens, and what they cost. The clock is of the engine's own processes: an idle vLLM spins for some time."""
    cpu_before, wall_before = cpu_clock(), time.perf_counter()
    tokens = run(prompts)
    return Measured(tokens, cpu_clock() - cpu_before, time.perf_counter() - wall_before)


def cpu_seconds() -> float:
    """CPU time of this process and of those below it."""
    below = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in below)


def show(rows: list[dict[str, Any]]) -> None:
    """Medians side by side; the ratio compares CPU time, which other work on the machine disturbs least."""
    table = Table("sequences side by side", "engine", "tokens per CPU second", "per wall second", "ratio to generate")
    for slots in dict.fromkeys(row["slots"] for row in rows):
        limit = _median(rows, slots, "transformers generate", "tokens_per_cpu_second")
        for engine in dict.fromkeys(row["engine"] for row in rows):
            cpu = _median(rows, slots, engine, "tokens_per_cpu_second")
            wall = _median(rows, slots, engine, "tokens_per_wall_second")
            table.add_row(str(slots), engine, f"{cpu:,.0f}", f"{wall:,.0f}", f"{cpu / limit:.2f}")
    Console(width=120).print(table)


def _median(rows: list[dict[str, Any]], slots: int, engine: str, name: str) -> float:
    return float(statistics.median(row[name] for row in rows if (row["slots"], row["engine"]) == (slots, engine)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every", type=int, default=4, help="take every n-th of the 900 held-out prompts")
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
