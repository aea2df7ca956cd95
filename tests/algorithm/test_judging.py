"""Judging: the solver's reward follows from outcomes alone."""

from collections.abc import Callable

import pytest

from azr_async.algorithm.judging import Judgement, judge_abduction, judge_deduction, judge_induction, judged_pairs
from azr_async.algorithm.values import encode, literal
from azr_async.messages import Outcome, Pair, Problem, Status

Judge = Callable[[Problem, Outcome], Judgement]

FAILURES: list[Status] = ["error", "timeout", "memory", "blocked", "nondeterministic", "output_too_long"]


def problem(*values: object, shown: int = 1) -> Problem:
    pairs = tuple(Pair(input="0", output=literal(value), value=encode(value)) for value in values)
    return Problem(task="induction", program="def f(x): ...", pairs=pairs, shown_pairs=shown)


def returned(value: object) -> Outcome:
    return Outcome(status="ok", value=encode(value), text=literal(value))


def judge_one_of_induction(task: Problem, outcome: Outcome) -> Judgement:
    return judge_induction(task, [outcome])


JUDGES: list[Judge] = [judge_deduction, judge_abduction, judge_one_of_induction]


@pytest.mark.parametrize("judge", JUDGES)
def test_the_gold_value_earns_1(judge: Judge) -> None:
    assert judge(problem([1, 2]), returned([1, 2])).reward == 1.0


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("value", [(1, 2), [1, 2.0], [True, 2], [2, 1], "[1, 2]", None])
def test_any_other_value_earns_minus_a_half(judge: Judge, value: object) -> None:
    assert judge(problem([1, 2]), returned(value)).reward == -0.5


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("status", FAILURES)
def test_a_run_that_fails_earns_minus_a_half_and_says_how(judge: Judge, status: Status) -> None:
    judgement = judge(problem(None), Outcome(status=status, error="because"))
    assert judgement.reward == -0.5
    assert f"{status}: because" in judgement.reason


@pytest.mark.parametrize("judge", JUDGES)
def test_an_answer_without_the_asked_form_earns_minus_1(judge: Judge) -> None:
    judgement = judge(problem(None), Outcome(status="rejected", error="not a literal", ran=False))
    assert judgement.reward == -1.0
    assert "not a literal" in judgement.reason


@pytest.mark.parametrize("judge", JUDGES)
def test_what_the_sandbox_lost_is_not_judged(judge: Judge) -> None:
    judgement = judge(problem(None), Outcome(status="lost", error="killed"))
    assert not judgement.is_judged
    assert "killed" in judgement.reason


def test_a_lost_pair_leaves_open_what_the_others_do_not_decide() -> None:
    lost = Outcome(status="lost")
    assert not judge_induction(problem(9, 0, 1, 2), [returned(0), lost, returned(2)]).is_judged
    wrong = judge_induction(problem(9, 0, 1, 2), [returned(0), lost, returned(9)])
    assert (wrong.reward, wrong.is_judged) == (-0.5, True)
    assert "pair 3 of 3" in wrong.reason


@pytest.mark.parametrize("judge", JUDGES)
def test_a_reason_names_the_limit(judge: Judge) -> None:
    outcome = Outcome(status="timeout", limit="cpu", error="CPU time")
    assert judge(problem(None), outcome).reason.endswith("timeout (cpu): CPU time")


def test_a_program_that_is_no_program_earns_minus_1() -> None:
    assert judge_induction(problem(None), [Outcome(status="error", error="not Python", ran=False)]).reward == -1.0


def test_every_pair_that_the_solver_was_not_shown_must_match() -> None:
    task = problem(0, 1, 2, 3, shown=1)
    assert judge_induction(task, [returned(1), returned(2), returned(3)]).reward == 1.0
    assert judge_induction(task, [returned(1), returned(2), returned(4)]).reward == -0.5
    assert judge_induction(task, [returned(0), returned(1), returned(2)]).reward == -0.5


def test_a_missing_run_never_counts_as_a_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge_induction(problem(0, 1, 2, shown=1), [returned(1)])
    with pytest.raises(ValueError, match="shorter"):
        judge_induction(problem(0, 1, shown=1), [])


def test_when_every_pair_was_shown_every_pair_is_judged() -> None:
    task = problem(0, 1, shown=2)
    assert judged_pairs(task) == task.pairs


def test_a_tolerance_is_a_choice() -> None:
    assert judge_deduction(problem(1.0), returned(1.0 + 1e-12)).reward == -0.5
    assert judge_deduction(problem(1.0), returned(1.0 + 1e-12), relative_tolerance=1e-9).reward == 1.0
