"""What a run's own files say about its speed: metrics.jsonl and config.yaml -> models of the machine and the work."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from azr_async.adapters.telemetry import METRICS_FILE
from azr_async.algorithm.judging import INDUCTION_RUNS
from azr_async.algorithm.simulation import CellLoad, Machine, Workload
from azr_async.config import Config
from azr_async.errors import ConfigError
from azr_async.messages import CELLS, Cell, cell_name
from azr_async.programs.summary import MetricsReader
from azr_async.programs.wiring import load_run_config

FEWEST_LINES: Final = 8
"""Steps without an evaluation that a trace needs."""
FIRST_STEPS: Final = 5
"""Left out: the pipeline fills, caches are cold."""
EVALUATION_STEPS: Final = 3
"""Left out after each evaluation: the next step waits for it, and what self-play has spent on it is in the usage of
that step's batch or of one of the two after it, which are asked for while it goes on."""
PROPORTION_STD: Final = 0.2
"""How far the share of a training step that is in proportion to its tokens is expected to lie from 1."""

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a run teaches."""

    config: Config
    machine: Machine
    workload: Workload
    steps_per_second: float
    """As measured, over the steps without an evaluation."""
    notes: tuple[str, ...]
    """What the trace does not tell, and what is assumed instead."""


def read_trace(run_dir: Path, *, cores: float | None) -> Trace:
    """Calibrate the model on a run.

    Args:
        run_dir: of a run with FEWEST_LINES steps between evaluations, after the first FIRST_STEPS.
        cores: how many the run's programs shared; None if each had a device of its own.

    Raises:
        ConfigError: there is no such run, or too little of it.
    """
    if not (run_dir / METRICS_FILE).is_file():
        raise ConfigError(f"--trace: there is no {METRICS_FILE} in {run_dir}. Name a folder of a run that has trained.")
    config = load_run_config(run_dir)
    lines = [line for line in MetricsReader(run_dir / METRICS_FILE).new_lines() if "cpu" in line]
    evaluated = {line["step"] for line in lines if "eval" in line}
    spans = [
        (before, after)
        for before, after in pairwise(lines[FIRST_STEPS - 1 :])
        if after["step"] == before["step"] + 1
        and evaluated.isdisjoint(range(after["step"] - EVALUATION_STEPS, after["step"]))
    ]
    if len(spans) < FEWEST_LINES:
        raise ConfigError(
            f"--trace: {run_dir} has {len(spans)} steps to learn from, after the first {FIRST_STEPS} and without those "
            f"of evaluations and the {EVALUATION_STEPS} after each; {FEWEST_LINES} are needed. Make a longer run that "
            f"evaluates seldom: python run.py --steps 40 --evaluation.every-steps 20."
        )
    evaluations = [line["eval"]["n"] for line in lines if "eval" in line]
    return _calibrated(config, spans, cores, evaluated_samples=evaluations[-1] if evaluations else 0)


def _calibrated(
    config: Config, spans: Sequence[tuple[Line, Line]], cores: float | None, *, evaluated_samples: int
) -> Trace:
    notes = list[str]()
    after = [line for _, line in spans]
    seconds = sum(line["wall_seconds"] - before["wall_seconds"] for before, line in spans)
    cells = {cell: _mean_cell(after, cell) for cell in CELLS if cell[1] in config.flow.tasks}
    made = {cell: sum(_made(line, cell, config) for line in after) for cell in cells}
    samples = sum(made.values())
    weights = {cell: _runs_of(cell, config) for cell in cells}
    runs = sum(made[cell] * weights[cell] for cell in cells)
    forks = _grown(spans, "sandbox", "forks")
    check_seconds = _grown(spans, "sandbox", "busy_seconds") if cores is None else _total(after, "cpu", "sandbox")
    step, row, prefill, prompt, install = _engine(config, spans, cores, notes)
    fixed, per_token = _learner(after, cores)
    pause = median(line["weights"]["pause_seconds"] for line in after)
    push = median(line["weights"]["push_seconds"] for line in after)
    machine = Machine(
        engines=config.inference_workers,
        slots=config.engine.slots,
        step_seconds=step,
        row_seconds=row,
        prefill_seconds=prefill,
        prompt_seconds=prompt,
        sandbox_workers=config.sandbox.workers,
        check_seconds=check_seconds / max(1.0, forks),
        file_seconds=_total(after, "cpu", "selfplay") / max(1.0, samples),
        learner_seconds=fixed,
        learner_token_seconds=per_token,
        push_seconds=max(0.0, push - pause) if cores is None else 0.0,  # else it is CPU time, and counted already
        pause_seconds=pause if install is None else install,
        cores=cores,
    )
    lags = [(line["lag"]["mean"], line["ess"]) for line in after if line["lag"]["mean"] > 0 and line["ess"]]
    if not lags:
        notes.append("the trace has no stale data, so ess is taken as 1 at every lag")
    workload = Workload(
        max_lag=config.flow.lag_limit,
        propose_samples=config.flow.propose_samples,
        solve_samples=config.flow.solve_samples,
        attempts=config.solve.attempts,
        trained_attempts=config.solve.trained_attempts,
        tasks=config.flow.tasks,
        cells={
            cell: CellLoad(tokens=tokens, tokens_std=std, checks=weights[cell] * forks / max(1.0, runs))
            for cell, (tokens, std) in cells.items()
        },
        valid_rate=_mean(x for line in after for x in line["valid_rate"].values()),
        late=config.flow.late,
        ess_loss=fmean((1.0 / ess - 1.0) / lag for lag, ess in lags) if lags else 0.0,
        evaluated_samples=evaluated_samples,
        evaluated_proposals=config.evaluation.proposals * len(config.flow.tasks),
        evaluated_every=config.evaluation.every_steps,
    )
    return Trace(
        config=config, machine=machine, workload=workload, steps_per_second=len(spans) / seconds, notes=tuple(notes)
    )


def _mean_cell(lines: Sequence[Line], cell: Cell) -> tuple[float, float]:
    seen = [found for line in lines if "tokens" in (found := line["cells"].get(cell_name(cell), {}))]
    return _mean(one["tokens"] for one in seen) or 1.0, _mean(one["tokens_std"] for one in seen)


def _made(line: Line, cell: Cell, config: Config) -> float:
    """Samples of the cell that this step cost: a valid proposal is attempted more often than it is trained on."""
    role, task = cell
    trained = float(line["cells"].get(cell_name(cell), {}).get("n", 0))
    if role == "propose":
        return trained
    proposed = float(line["cells"].get(cell_name(("propose", task)), {}).get("n", 0))
    valid = proposed * (line["valid_rate"].get(task) or 0.0)
    return trained + valid * (config.solve.attempts - config.solve.trained_attempts)


def _runs_of(cell: Cell, config: Config) -> float:
    """Sandbox runs that a sample asks for; how many of them a malformed or remembered one saves, the trace tells."""
    if cell[0] == "propose":
        return float(config.propose.determinism_runs)
    return {"deduction": 0.0, "abduction": 1.0, "induction": float(INDUCTION_RUNS)}[cell[1]]


def _engine(
    config: Config, spans: Sequence[tuple[Line, Line]], cores: float | None, notes: list[str]
) -> tuple[float, float, float, float, float | None]:
    """Seconds of a step, of a row in it, of a prefill, of a prompt in it; CPU seconds of taking over new weights, if
    they are known and count."""
    if not spans[-1][1]["engines"].get("pace", {}).get("steps"):
        notes.append("the engine does not tell its steps, so its rate is taken to be the same at any concurrency")
        busy = ((line["wall_seconds"] - before["wall_seconds"]) * line["busy"]["inference"] for before, line in spans)
        tokens = _total([line for _, line in spans], "tokens", "generated")
        return 0.0, sum(busy) * config.inference_workers / max(1.0, tokens), 0.0, 0.0, None

    def sums(*names: str) -> list[float]:
        return [_grown(spans, "engines", "pace", name) for name in names]

    steps = sums("steps", "rows", "rows_squared", "step_seconds", "rows_seconds")
    prefills = sums("prefills", "prompts", "prompts_squared", "prefill_seconds", "prompts_seconds")
    step, row = _line(*steps)
    prefill, prompt = _line(*prefills)
    if cores is None:
        return step, row, prefill, prompt, None
    installs, install_seconds = sums("installs", "install_seconds")
    # what the process does besides: moving messages, and the bytes of weights
    beside = max(0.0, _grown(spans, "engines", "cpu_seconds") - steps[3] - prefills[3] - install_seconds)
    row += beside / max(1.0, steps[1])
    return step, row, prefill, prompt, install_seconds / installs if installs else None


def _learner(lines: Sequence[Line], cores: float | None) -> tuple[float, float]:
    """Seconds of a step and of a trained token in it.

    Batches of one run are so alike that a line through its steps says little about other sizes. Where it leaves that
    open, a step costs in proportion to its tokens (`PROPORTION_STD`).
    """
    x = [float(line["tokens"]["trained"]) for line in lines]
    y = [line["train_seconds"] if cores is None else line["cpu"]["learner"] for line in lines]
    n, products = len(x), sum(one * two for one, two in zip(x, y, strict=True))
    fixed, slope = _line(n, sum(x), sum(one * one for one in x), sum(y), products)
    mean = sum(y) / n
    scatter = sum((two - fixed - slope * one) ** 2 for one, two in zip(x, y, strict=True)) / max(1, n - 2)
    return _line(n, sum(x), sum(one * one for one in x), sum(y), products, lean=scatter / (PROPORTION_STD * mean) ** 2)


def _line(n: float, x: float, xx: float, y: float, xy: float, *, lean: float = 0.0) -> tuple[float, float]:
    """The least-squares line through n points (x, y), as height and slope, neither below zero; through the origin when
    all x are the same.

    Args:
        x: their sum, as of the squares, of y, and of the products.
        lean: what the slope's prior, that the height is zero, weighs against the points: their variance about the line,
            in multiples of that of the share of the mean that is not height.
    """
    if x <= 0:
        return 0.0, 0.0
    mean_x, mean_y = x / max(1.0, n), y / max(1.0, n)  # traces of before 2026-11-23 have not counted prefills
    spread, common = xx - x * mean_x, xy - x * mean_y
    if spread + lean * mean_x**2 <= 1e-12 * xx:
        return 0.0, mean_y / mean_x
    slope = (common + lean * mean_x * mean_y) / (spread + lean * mean_x**2)
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def _total(lines: Sequence[Line], group: str, name: str) -> float:
    return float(sum(line.get(group, {}).get(name) or 0.0 for line in lines))


def _grown(spans: Sequence[tuple[Line, Line]], *names: str) -> float:
    """By how much a counter that only grows has grown in these spans."""

    def count_in(line: Line) -> float:
        *groups, last = names
        for name in groups:
            line = line.get(name, {})
        return float(line.get(last) or 0.0)

    return sum(max(0.0, count_in(after) - count_in(before)) for before, after in spans)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else 0.0
