"""When a draft becomes a task."""

from azr_async.algorithm.validity import problem_from, program_key
from azr_async.algorithm.values import encode
from azr_async.messages import Draft, Outcome, Problem, Status, Task


def ok(value: object) -> Outcome:
    return Outcome(status="ok", value=encode(value), text=repr(value))


def bad(status: Status) -> Outcome:
    return Outcome(status=status, error="why")


def draft(*inputs: str, task: Task = "deduction", program: str = "def f(x):\n    return x") -> Draft:
    return Draft(task=task, program=program, inputs=inputs, message="words")


def verdict(what: Draft, *outcomes: Outcome, limit: int = 50) -> Problem | str:
    return problem_from(what, outcomes, text_limit=limit, held_out_programs={"def f(x):\n    return 9"})


def test_a_program_that_ran_is_a_task_with_its_output() -> None:
    result = verdict(draft("1"), ok(1))
    assert isinstance(result, Problem)
    assert (result.pairs[0].input, result.pairs[0].output) == ("1", "1")


def test_the_reason_is_the_status_of_what_failed() -> None:
    assert verdict(draft("1"), bad("nondeterministic")) == "nondeterministic"
    assert verdict(draft("1"), bad("timeout")) == "timeout"


def test_what_the_sandbox_lost_is_neither_a_task_nor_its_authors_fault() -> None:
    assert verdict(draft("1"), bad("lost")) == "lost"
    assert verdict(draft("1", "2", "3", task="induction"), ok(1), bad("lost"), ok(3)) == "lost"
    assert verdict(draft("1", program="def f(x):\n    return 9"), bad("lost")) == "held_out"


def test_an_output_over_the_limit_is_rejected_not_cut() -> None:
    assert verdict(draft("1"), ok("a" * 60)) == "too_long_or_too_few"


def test_a_held_out_program_is_named_whatever_its_blank_lines() -> None:
    again = draft("1", program="\ndef f(x):   \n\n    return 9\n\n")
    assert program_key(again.program) == "def f(x):\n    return 9"
    assert verdict(again, ok(9)) == "held_out"


def test_induction_keeps_the_inputs_that_ran_and_shows_half_of_them() -> None:
    result = verdict(draft("1", "2", "3", "4", task="induction"), ok(1), bad("error"), ok(3), ok(4))
    assert isinstance(result, Problem)
    assert [pair.input for pair in result.pairs] == ["1", "3", "4"]
    assert result.shown_pairs == 2
    assert result.message == "words"


def test_induction_can_be_asked_to_run_on_every_input() -> None:
    proposed = draft("1", "2", "3", task="induction")
    outcomes = [ok(1), bad("error"), ok(3)]
    assert problem_from(proposed, outcomes, text_limit=50, held_out_programs=(), every_pair=True) == "error"


def test_induction_needs_a_pair_to_show_and_one_to_judge_by() -> None:
    assert verdict(draft("1", "2", task="induction"), ok(1), bad("error")) == "error"
