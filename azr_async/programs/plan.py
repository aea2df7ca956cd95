"""`python -m azr_async plan`: which split of the GPUs, how stale? A model of a run, calibrated on a run, answers."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from azr_async.algorithm.simulation import Machine, Workload, simulate
from azr_async.errors import AzrError, ConfigError
from azr_async.programs.arguments import whole_number
from azr_async.programs.trace import FIRST_STEPS, Trace, read_trace

LAGS: Final = (0, 1, 2, 4, 8)
ENOUGH: Final = 0.02
"""Plans that differ by less are equal, and the one with the younger data is recommended."""
LARGE_STRETCH: Final = 1.25
"""Beyond it the model has missed something, and its user is told."""

DESCRIPTION: Final = """\
Predict rate, busy shares and staleness of splits and staleness bounds that have not been run, from one run that has
(its config.yaml and metrics.jsonl; about 20 steps are enough), and recommend one.

What is assumed where the trace has not seen it:
  * an engine takes as long for a step as in the trace: a constant part and one per running sequence;
  * engines do not slow each other down; they share work evenly, sequence by sequence;
  * the part of a training step that grows with its tokens is divided by the number of train GPUs, the rest is not;
  * a push takes as long whatever the split; the sandbox and self-play are as fast as in the trace;
  * lengths of answers, the share of valid proposals and the loss of effective sample size per step of lag stay.
Without GPUs the programs share the cores: their CPU seconds count, divided evenly among those that compute.
With --gpus and a trace of a run without GPUs, a GPU is as fast as one core was.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One configuration and what is predicted for it."""

    inference_gpus: int
    train_gpus: int
    """0 and 0: the machine of the trace, without GPUs."""
    max_lag: int
    steps_per_second: float
    tokens_per_second: float
    """Trained ones."""
    ess: float
    lag_mean: float
    lag_max: int
    busy_inference: float
    busy_learner: float
    busy_sandbox: float

    @property
    def useful_tokens_per_second(self) -> float:
        """What a plan is judged by: trained tokens, each counted for what it is worth."""
        return self.tokens_per_second * self.ess


def main(arguments: Sequence[str]) -> int:
    """Predict and recommend; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as leaving:  # argparse has told the user what is wrong, or what --help asks for
        return int(leaving.code or 0)
    try:
        trace, plans = plan(options)
    except AzrError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    best, reason = recommended(plans)
    if options.json:
        content = {"plans": [_as_json(one) for one in plans], "recommended": _as_json(best), "reason": reason}
        print(json.dumps(content | {"notes": list(trace.notes)}, indent=1))
    else:
        _show(Console(), trace, plans, best, reason)
    return 0


def plan(options: argparse.Namespace) -> tuple[Trace, list[Plan]]:
    """All that is asked for. Raises ConfigError: a trace that says too little, or a split that cannot be."""
    trace = read_trace(options.trace, cores=options.cores if options.gpus is None else None)
    stretch = stretch_of(trace, steps=options.steps)
    if not 1.0 / LARGE_STRETCH <= stretch <= LARGE_STRETCH:
        note = (
            f"a step of the trace took {stretch:.2f} times as long as its own numbers let expect (another load on its "
            "machine?); the predictions take as much longer, and are to be trusted less"
        )
        trace = replace(trace, notes=(*trace.notes, note))
    work = replace(
        trace.workload,
        propose_samples=options.propose_samples or trace.workload.propose_samples,
        solve_samples=options.solve_samples or trace.workload.solve_samples,
        evaluated_every=0,
    )
    machine = replace(
        trace.machine,
        slots=options.slots or trace.machine.slots,
        sandbox_workers=options.sandbox_workers or trace.machine.sandbox_workers,
    )
    return trace, [
        predicted(on, replace(work, max_lag=max_lag), steps=options.steps, split=split, stretch=stretch)
        for split, on in _machines(options, trace, machine)
        for max_lag in options.max_lag
    ]


def stretch_of(trace: Trace, *, steps: int) -> float:
    """How many times as long a step of the trace took as one of a model run of the same configuration.

    Messages on their way and threads that have to wake up are not in the model. Where a trace was made without GPUs and
    is taken for one with them, or the other way round, the two cannot be compared: 1.
    """
    if (trace.machine.cores is None) == (trace.config.placement.inference_gpus == 0):
        return 1.0
    again = predicted(trace.machine, replace(trace.workload, evaluated_every=0), steps=steps)
    return again.steps_per_second / trace.steps_per_second


def predicted(
    machine: Machine, work: Workload, *, steps: int, split: tuple[int, int] = (0, 0), stretch: float = 1.0
) -> Plan:
    """Play a run of so many steps, each of which takes `stretch` times as long as the model says.

    The first ones, in which the pipeline fills, do not count.
    """
    played = simulate(machine, work, steps=steps).steps
    steady = played[FIRST_STEPS:]
    model_seconds, tokens = sum(step.seconds for step in steady), sum(step.trained_tokens for step in steady)
    seconds = stretch * model_seconds
    before, after = played[FIRST_STEPS - 1].busy_seconds, steady[-1].busy_seconds
    busy = {name: (after[name] - before.get(name, 0.0)) / model_seconds for name in after}
    return Plan(
        inference_gpus=split[0],
        train_gpus=split[1],
        max_lag=work.max_lag,
        steps_per_second=len(steady) / seconds,
        tokens_per_second=tokens / seconds,
        ess=sum(step.ess for step in steady) / len(steady),
        lag_mean=sum(step.lag_mean for step in steady) / len(steady),
        lag_max=max(step.lag_max for step in steady),
        busy_inference=busy["inference"] / machine.engines,
        busy_learner=busy["learner"],
        busy_sandbox=busy.get("sandbox", 0.0) / machine.sandbox_workers,
    )


def recommended(plans: Sequence[Plan]) -> tuple[Plan, str]:
    """The plan with the most useful tokens per second; among those that are about equal, the youngest data wins."""
    most = max(plan.useful_tokens_per_second for plan in plans)
    equal = [plan for plan in plans if plan.useful_tokens_per_second >= (1.0 - ENOUGH) * most]
    best = min(equal, key=lambda plan: (plan.max_lag, -plan.useful_tokens_per_second))
    shares = {"inference": best.busy_inference, "the learner": best.busy_learner, "the sandbox": best.busy_sandbox}
    slowest = max(shares, key=lambda name: shares[name])
    reason = f"{best.useful_tokens_per_second:,.0f} useful tokens/s, within {ENOUGH:.0%} of the most there is"
    if best.max_lag > 0:
        reason += f", at a mean lag of {best.lag_mean:.1f}"
    return best, f"{reason}; {slowest} limits it, busy {shares[slowest]:.0%}."


def _machines(options: argparse.Namespace, trace: Trace, machine: Machine) -> Iterator[tuple[tuple[int, int], Machine]]:
    if options.gpus is None:
        if options.split:
            raise ConfigError("--split needs --gpus: without it the programs share the cores of the trace's machine.")
        yield (0, 0), machine
        return
    span, ranks = trace.config.placement.tensor_parallel, trace.config.learner_ranks
    splits = options.split or [(count, options.gpus - count) for count in range(span, options.gpus, span)]
    if not splits:
        raise ConfigError(
            f"--gpus {options.gpus} cannot be split: engines span {span} of them (placement.tensor_parallel) and the "
            f"learner needs one. Use {span + 1} or more."
        )
    for inference, train in splits:
        if inference < span or inference % span or train < 1 or inference + train > options.gpus:
            raise ConfigError(
                f"--split {inference}+{train} cannot be had of {options.gpus} GPUs: inference takes a multiple of "
                f"{span} (placement.tensor_parallel), the learner at least 1. Try {span}+{options.gpus - span}."
            )
        per_token = machine.learner_token_seconds * ranks / train
        yield (inference, train), replace(machine, engines=inference // span, learner_token_seconds=per_token)


def _show(console: Console, trace: Trace, plans: Sequence[Plan], best: Plan, reason: str) -> None:
    has_gpus = best.train_gpus > 0
    title = "Trained tokens per second; useful = tokens/s x ess; busy shares of inference, learner and sandbox."
    columns = ["max lag", "steps/s", "tokens/s", "ess", "useful/s", "lag", "infer", "learn", "sandb"]
    table = Table(*(["GPUs"] if has_gpus else []), *columns, title=title, title_justify="left")
    for one in plans:
        cells = [
            str(one.max_lag),
            f"{one.steps_per_second:.3g}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.ess:.3f}",
            f"{one.useful_tokens_per_second:,.0f}",
            f"{one.lag_mean:.2f}",
            *(f"{share:.0%}" for share in (one.busy_inference, one.busy_learner, one.busy_sandbox)),
        ]
        split = [f"{one.inference_gpus}+{one.train_gpus}"] if has_gpus else []
        table.add_row(*split, *cells, style="bold green" if one == best else None)
    console.print(table)
    console.print(f"The trace ran {trace.steps_per_second:.3g} steps/s with max lag {trace.config.flow.max_lag}.")
    for note in trace.notes:
        console.print(f"Note: {note}.", markup=False)
    options = f"--max-lag {best.max_lag}"
    if has_gpus:
        options = f"--inference-gpus {best.inference_gpus} --train-gpus {best.train_gpus} {options}"
    console.print(f"Recommended: {options}. {reason}", markup=False, soft_wrap=True)


def _as_json(one: Plan) -> dict[str, float]:
    return asdict(one) | {"useful_tokens_per_second": one.useful_tokens_per_second}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m azr_async plan",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores, count = os.cpu_count() or 1, whole_number(1)
    option = parser.add_argument
    option("--trace", type=Path, required=True, metavar="RUN_DIR", help="folder of the run to learn from")
    option("--gpus", type=count, metavar="N", help="GPUs to split; left out: the machine of the trace, without GPUs")
    option("--split", type=_split, action="append", metavar="I+T", help="only this split; may be repeated")
    option("--max-lag", type=_lags, default=LAGS, metavar="K,..", help="staleness bounds to compare [0,1,2,4,8]")
    option(
        "--cores",
        type=count,
        default=cores,
        help=f"of the machine that the trace was made on, if without GPUs [{cores}]",
    )
    option("--slots", type=count, metavar="N", help="other engine.slots than the trace")
    option("--sandbox-workers", type=count, metavar="N", help="other sandbox.workers than the trace")
    option("--propose-samples", type=count, metavar="N", help="other flow.propose_samples than the trace")
    option("--solve-samples", type=count, metavar="N", help="other flow.solve_samples than the trace")
    option(
        "--steps",
        type=whole_number(FIRST_STEPS + 1),
        default=40,
        help=f"length of the model run, of which {FIRST_STEPS} do not count [40]",
    )
    option("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _lags(text: str) -> tuple[int, ...]:
    lags = tuple(map(int, text.split(",")))
    if min(lags) < 0:
        raise argparse.ArgumentTypeError(f"{min(lags)} is negative")
    return lags


def _split(text: str) -> tuple[int, int]:
    inference, plus, train = text.partition("+")
    if not plus:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 6+2")
    return int(inference), int(train)
