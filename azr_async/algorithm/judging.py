"""The solver's reward: what the outcomes of running an answer say about it. Pure; `stages/verify.py` does the running.

Zhao et al. 2025 (Absolute Zero), arXiv:2505.03335, section 3.1, Eq. 5 and 6: 1 for a right answer, -0.5 for a
well-formed wrong one, -1 for one that has not the asked form. The gold value is compared here, outside the
process that ran the answer, as canonical text; so an answer can neither see it nor decide what "equal" means.

An answer has not the asked form if it never came to run: it is no literal (deduction), no argument list of literals
(abduction), no Python program that defines `f` within the rules (induction). Whatever happens to it later - an error, a
limit, two different results - makes it wrong. What the sandbox has lost is not judged: nobody knows what it is worth.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from azr_async.algorithm.values import equal
from azr_async.messages import Outcome, Pair, Problem

RIGHT: Final = 1.0
WRONG: Final = -0.5
MALFORMED: Final = -1.0
INDUCTION_RUNS: Final = 2
"""How often an answered program is run: one run in one process would let it count its calls, or win by chance."""


class Judgement(NamedTuple):
    """A solver's reward and why it got it."""

    reward: float
    reason: str
    is_judged: bool = True
    """False: the host kept the sandbox from running the answer, and the reward means nothing."""


def judge_deduction(problem: Problem, answer: Outcome, *, relative_tolerance: float = 0.0) -> Judgement:
    """Predict the output: `answer` is what `sandbox.literal` made of the answered text."""
    return _compare(problem.pairs[0], answer, relative_tolerance, "another value than the program returns")


def judge_abduction(problem: Problem, run: Outcome, *, relative_tolerance: float = 0.0) -> Judgement:
    """Find an input: `run` is the problem's program on the answered input. Any pre-image of the output is right."""
    return _compare(problem.pairs[0], run, relative_tolerance, "the program returns another value for this input")


def judge_induction(problem: Problem, runs: Sequence[Outcome], *, relative_tolerance: float = 0.0) -> Judgement:
    """Write the program: `runs` is the answered program on the inputs of `judged_pairs(problem)`; all must match.

    Raises ValueError when the number of runs is another one, since a missing run must never count as a match.
    """
    pairs = judged_pairs(problem)
    verdict = Judgement(RIGHT, "right")
    for number, (pair, run) in enumerate(zip(pairs, runs, strict=True), start=1):
        judgement = _compare(pair, run, relative_tolerance, "another value")
        if judgement.reward != RIGHT:
            verdict = judgement._replace(reason=f"pair {number} of {len(pairs)}: {judgement.reason}")
            if verdict.is_judged:  # else another pair may tell
                return verdict
    return verdict


def judged_pairs(problem: Problem) -> tuple[Pair, ...]:
    """The pairs that an induction answer is run on: those the solver was not shown; all, if it was shown all."""
    return problem.pairs[problem.shown_pairs :] or problem.pairs


def _compare(pair: Pair, outcome: Outcome, relative_tolerance: float, difference: str) -> Judgement:
    if outcome.status == "lost":
        return Judgement(WRONG, f"not judged: {outcome.error}", is_judged=False)
    if not outcome.ran:
        return Judgement(MALFORMED, outcome.error)
    if outcome.status != "ok":
        what = f"{outcome.status} ({outcome.limit})" if outcome.limit else outcome.status
        return Judgement(WRONG, f"{what}: {outcome.error}" if outcome.error else what)
    if not equal(pair.value, outcome.value, relative_tolerance):
        return Judgement(WRONG, difference)
    return Judgement(RIGHT, "right")
