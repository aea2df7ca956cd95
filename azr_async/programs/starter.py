"""`python -m azr_async starter`: makes the starter model and its held-out suite again from nothing."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from azr_async.errors import AzrError, CheckpointError, ConfigError
from azr_async.messages import TASKS
from azr_async.starter.evaluation import Report, evaluate
from azr_async.starter.suite import draw_suite, write_suite
from azr_async.starter.tokenizer import build_tokenizer
from azr_async.starter.training import Phase, build_model, train

SUITE_NAME: Final = "heldout.jsonl"
WARM_STEPS: Final = 6500
NOISE_STEPS: Final = 450

_WARM_LEARNING_RATE: Final = 4e-3
_NOISE_LEARNING_RATE: Final = 1.5e-3
_WRONG_SHARE: Final = 0.65


def main(arguments: Sequence[str]) -> int:
    """Train, measure and save; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    console = Console(stderr=True)
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as leaving:  # argparse has told the user what is wrong, or what --help asks for
        return int(leaving.code or 0)
    try:
        _make(options.output, options.seed, _phases(options), options.measured_problems, console)
    except ConfigError as error:
        console.print(f"starter: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except AzrError as error:
        console.print(f"starter: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("starter: stopped; nothing was written.", markup=False, highlight=False)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async starter",
        description="Make the starter model from nothing: pretrain it on clean conversations, then on noisy ones, and "
        "draw the held-out suite. Takes ten to fifteen minutes of one core. A seed gives the same model each time.",
    )
    parser.add_argument("--output", type=Path, default=Path("starter"), help="new folder for the model [starter]")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights and the corpora [0]")
    parser.add_argument("--warm-steps", type=_count, default=WARM_STEPS, help=f"steps on clean text [{WARM_STEPS}]")
    parser.add_argument("--noise-steps", type=_count, default=NOISE_STEPS, help=f"steps on noisy text [{NOISE_STEPS}]")
    parser.add_argument(
        "--measured-problems", type=_count, default=900, help="held-out problems to measure on after each corpus [900]"
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _phases(options: argparse.Namespace) -> tuple[Phase, Phase]:
    return (
        Phase("clean", options.warm_steps, _WARM_LEARNING_RATE, wrong_share=0.0),
        Phase("noisy", options.noise_steps, _NOISE_LEARNING_RATE, wrong_share=_WRONG_SHARE),
    )


def _make(folder: Path, seed: int, phases: Sequence[Phase], measured_problems: int, console: Console) -> None:
    # More threads are slower at this size, and would make sums, and so the model, depend on the number of cores.
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    tokenizer, suite = build_tokenizer(), draw_suite()
    measured = suite[:: max(1, len(suite) // measured_problems)] if measured_problems else []
    model = build_model(tokenizer, seed=seed)
    table = Table("after", "deduction", "abduction", "induction", "mean", "valid proposals")
    with _whole_or_absent(folder) as partial:
        for phase in phases:
            _train_with_bar(model, tokenizer, phase, seed, console)
            report = evaluate(model, tokenizer, measured, proposals_per_task=len(measured) // 9, seed=seed)
            table.add_row(f"{phase.steps} {phase.name} steps", *_cells(report))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_suite(partial / SUITE_NAME, suite)
    console.print(table)
    console.print(f"Greedy accuracy on {len(measured)} of the {len(suite)} held-out problems in {folder / SUITE_NAME}.")


@contextmanager
def _whole_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all went well and vanishes otherwise."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Move it away, or name a new folder with --output.")
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"could not write {folder}: {error}. Free some space or change --output.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train_with_bar(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        bar = progress.add_task(f"{phase.name} conversations", total=phase.steps, loss=float("nan"))
        for loss in train(model, tokenizer, phase, seed=seed):
            progress.update(bar, advance=1, loss=loss)


def _cells(report: Report) -> list[str]:
    by_task = [f"{report.accuracy[task]:.3f}" for task in TASKS]
    valid = " ".join(f"{report.valid[task]:.2f}" for task in TASKS)
    return [*by_task, f"{report.mean_accuracy:.3f} ± {report.standard_error:.3f}", valid]
