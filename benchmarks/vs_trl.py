"""How do we compare with TRL's GRPO on the same model, tasks, rewards, lengths and cores? (`pip install -e '.[trl]'`)

Both train the shipped starter to solve the same fixed tasks, 288 completions a step of at most 48 tokens, eight per
prompt, judged by the same code in the same sandbox, with the same optimizer and learning rate; interleaved repeats in
one run. Ours runs first, for so many steps; TRL gets the same wall time of training. Then both final models answer the
same held-out tasks greedily. What stays different is what is compared: TRL generates, judges and trains in turns in one
process with as many threads as there are cores, with GRPO's group baseline; ours streams through processes of one
thread each, with TRR++'s baseline per task kind, up to two versions stale, and spends one proposal per kind and step
of its samples on new tasks, since it is a self-play trainer (they are not trained on: propose_weight 0).

    python benchmarks/vs_trl.py --repeats 3 --steps 80 --output benchmarks/results/vs-trl.json
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from whole_runs import run, write_json

from azr_async.adapters.sandbox.pool import SandboxPool
from azr_async.algorithm.dialogue.compact import CompactDialogue
from azr_async.config import LearnerConfig, SandboxConfig, SolveConfig
from azr_async.messages import TASKS, Completion, Problem
from azr_async.programs.evaluate import judge_all
from azr_async.starter.corpus import random_problem
from azr_async.starter.suite import STARTER_CHECKPOINT

SAMPLES: Final = 288
"""Completions a step: the default of `run.py`, 96 of each of three kinds."""
GROUP: Final = 8
REWARD_SECONDS_MOST: Final = 120.0


def main() -> None:
    """Run both, interleaved, and print them side by side."""
    arguments = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(arguments.repeats):
            folder, seed = Path(scratch) / str(repeat), repeat + 1
            tasks = fixed_tasks(arguments.tasks, seed=seed)
            ours = ours_trained(folder / "ours", tasks, steps=arguments.steps, seed=seed)
            theirs = _in_new_process(theirs_trained, folder / "trl", tasks, ours["seconds"], seed, arguments.threads)
            for name, row in (("ours", ours), ("trl", theirs)):
                row["accuracy"] = held_out_accuracy(row.pop("model"))
                rows.append({"trainer": name, "seed": seed, **row})
                Console().print(rows[-1])
    before = held_out_accuracy("starter")
    show(rows, before)
    write_json(
        arguments.output, "vs_trl", {"before": before, "settings": vars(arguments) | {"output": ""}, "rows": rows}
    )


def fixed_tasks(per_kind: int, *, seed: int) -> list[Problem]:
    """Distinct tasks that the starter's grammar draws, none of them held out."""
    random, problems = Random(f"{seed} tasks"), dict[tuple[str, str, str], Problem]()
    for number, task in enumerate(TASKS, start=1):
        while len(problems) < per_kind * number:
            problem = random_problem(random, task, held_out=False)
            problems.setdefault(problem.key, problem)
    return list(problems.values())


def ours_trained(folder: Path, tasks: Sequence[Problem], *, steps: int, seed: int) -> dict[str, Any]:
    """`run.py` on these tasks; seconds and tokens of the steps, and where the trained model lies."""
    folder.mkdir(parents=True)
    seeds = folder / "tasks.jsonl"
    seeds.write_text("".join(json.dumps(_seed_line(problem)) + "\n" for problem in tasks), encoding="utf-8")
    lines = run(
        folder / "run",
        *("--library.seed-file", str(seeds), "--library.seed-tasks", "1", "--seed", str(seed), "--steps", str(steps)),
        *("--flow.propose-samples", "1", "--learner.propose-weight", "0", "--evaluation.suite", "none"),
    )
    return {
        "seconds": lines[-1]["wall_seconds"],
        "steps": lines[-1]["step"],
        "trained_tokens": sum(line["tokens"]["trained"] for line in lines),
        "model": str(folder / "run" / "checkpoints" / f"step-{steps:06d}"),
    }


def theirs_trained(folder: Path, tasks: Sequence[Problem], seconds: float, seed: int, threads: int) -> dict[str, Any]:
    """TRL's GRPO on these tasks for so many seconds; steps and tokens, and where the trained model lies."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    torch.set_num_threads(threads)
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(STARTER_CHECKPOINT)
    dialogue, trained_tokens, timer = CompactDialogue(), 0, _stop_after(seconds)
    rows = [{"prompt": dialogue.solve(problem).text, "number": index} for index, problem in enumerate(tasks)]
    with judging() as judge:

        def reward(completion_ids: list[list[int]], number: list[int], **_: object) -> list[float]:
            nonlocal trained_tokens
            trained_tokens += sum(map(len, completion_ids))
            completions = [_completion(tokenizer, index, ids) for index, ids in enumerate(completion_ids)]
            return judge([tasks[index] for index in number], completions)

        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(STARTER_CHECKPOINT),
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            callbacks=[timer],
            args=_grpo_settings(folder, seed),
        )
        trainer.train()
        taken = time.monotonic() - timer.began
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(folder / "model")
    return {
        "seconds": taken,
        "steps": trainer.state.global_step,
        "trained_tokens": trained_tokens,
        "model": str(folder / "model"),
    }


def _grpo_settings(folder: Path, seed: int) -> Any:  # noqa: ANN401 - trl is optional
    """Ours, in their words."""
    from trl import GRPOConfig

    learner, solve = LearnerConfig(), SolveConfig()
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=solve.max_tokens,
        temperature=solve.temperature,
        top_k=0,
        learning_rate=learner.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=learner.warmup_steps,
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.clip_norm,
        beta=0.0,
        max_steps=1_000_000,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=50,
        disable_tqdm=True,
    )


def _stop_after(seconds: float) -> Any:  # noqa: ANN401 - transformers' callbacks are loaded by TRL's process only
    """A callback that ends the training after so long; `began` is when it began."""
    from transformers import TrainerCallback

    class StopAfter(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.began = time.monotonic()

        def on_step_end(self, _arguments: object, _state: object, control: Any, **__: object) -> None:  # noqa: ANN401
            control.should_training_stop = time.monotonic() - self.began >= seconds

    return StopAfter()


@contextmanager
def judging() -> Iterator[Callable[[Sequence[Problem], Sequence[Completion]], list[float]]]:
    """The verify stage over a sandbox of its own, as a plain function: problems and completions -> rewards."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, SandboxPool]] = Future()

    async def serve() -> None:
        settings = SandboxConfig()
        async with SandboxPool(
            workers=settings.workers,
            wall_seconds=settings.wall_seconds,
            cpu_seconds=settings.cpu_seconds,
            memory_mb=settings.memory_mb,
            allowed_imports=settings.allowed_imports,
        ) as sandbox:
            over = asyncio.Event()
            ready.set_result((asyncio.get_running_loop(), over, sandbox))
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="judging")
    thread.start()
    loop, over, sandbox = ready.result(REWARD_SECONDS_MOST)

    def judge(problems: Sequence[Problem], completions: Sequence[Completion]) -> list[float]:
        judging = judge_all(problems, completions, sandbox=sandbox, dialogue=CompactDialogue())
        return asyncio.run_coroutine_threadsafe(judging, loop).result(REWARD_SECONDS_MOST)

    try:
        yield judge
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(REWARD_SECONDS_MOST)


def _completion(tokenizer: Any, index: int, token_ids: list[int]) -> Completion:  # noqa: ANN401
    is_ended = token_ids[-1] == tokenizer.eos_token_id
    kept = token_ids[:-1] if is_ended else token_ids
    return Completion(
        job_id=index,
        index=0,
        prompt_ids=np.zeros(0, np.int32),
        token_ids=np.asarray(token_ids, np.int32),
        behavior_logp=np.zeros(len(token_ids), np.float32),  # not sent to anybody: only the text is judged
        token_version=np.zeros(len(token_ids), np.int32),
        text=tokenizer.decode(kept, skip_special_tokens=False),
        finish="stop" if is_ended else "length",
    )


def held_out_accuracy(model: str) -> float:
    """Share of the 900 held-out tasks that the model solves greedily."""
    command = [sys.executable, "-m", "azr_async", "evaluate", "--model", model, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {finished.returncode}:\n{finished.stderr[-2000:]}")
    return float(json.loads(finished.stdout)["all"]["accuracy"])


def show(rows: list[dict[str, Any]], before: float) -> None:
    """Means over the repeats, side by side."""
    table = Table("", "ours", "TRL GRPO", "ratio")
    arms = [[row for row in rows if row["trainer"] == name] for name in ("ours", "trl")]
    for arm in arms:
        for row in arm:
            row["tokens_per_second"] = row["trained_tokens"] / row["seconds"]
    for title, name in (
        ("trained tokens per second", "tokens_per_second"),
        ("optimizer steps", "steps"),
        ("seconds of training", "seconds"),
        (f"held-out accuracy after it (before: {before:.1%})", "accuracy"),
    ):
        ours, theirs = ([row[name] for row in arm] for arm in arms)
        ratio = statistics.fmean(ours) / statistics.fmean(theirs)
        table.add_row(title, _spread(ours), _spread(theirs), f"{ratio:.2f}")
    Console(width=120).print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def _seed_line(problem: Problem) -> dict[str, Any]:
    line: dict[str, Any] = {"task": problem.task, "program": problem.program, "message": problem.message}
    inputs = [pair.input for pair in problem.pairs]
    return line | ({"inputs": inputs} if problem.task == "induction" else {"input": inputs[0]})


def _in_new_process(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """So that nothing of one repeat is warm, or left over, for the next."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="of ours; TRL gets the wall time that they took")
    parser.add_argument("--tasks", type=int, default=200, help="fixed tasks per kind")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of TRL's process")
    parser.add_argument("--output", type=Path, help="write the results as JSON, too")
    return parser


if __name__ == "__main__":
    main()
