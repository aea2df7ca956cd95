"""The starter's little world."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.starter.grammar import is_held_out, is_runnable, random_input, random_program, read_value, run

seeds = st.integers(0, 2**32)


def python_says(program: str, argument: str) -> str | None:
    """What Python itself returns; the text is of our own grammar."""
    scope: dict[str, object] = {}
    exec(compile(program, "<grammar>", "exec"), scope)
    try:
        return repr(scope["f"](read_value(argument)))  # type: ignore[operator]
    except (TypeError, ValueError, IndexError, AttributeError):
        return None


@given(seed=seeds)
def test_a_seed_draws_the_same_program_and_input(seed: int) -> None:
    first, second = Random(seed), Random(seed)
    assert random_program(first, sloppiness=0.2) == random_program(second, sloppiness=0.2)
    assert random_input(first, "list") == random_input(second, "list")


@given(seed=seeds, sloppiness=st.sampled_from([0.0, 0.5]))
def test_the_table_agrees_with_python(seed: int, sloppiness: float) -> None:
    random = Random(seed)
    program = random_program(random, sloppiness=sloppiness)
    argument = random_input(random, random.choice(["list", "text", "number", program.takes]))
    assert is_runnable(program.source)
    assert run(program.source, argument) == python_says(program.source, argument)


@given(seed=seeds, statements=st.sampled_from([1, 2]))
def test_a_program_has_a_word_and_a_line_per_statement(seed: int, statements: int) -> None:
    program = random_program(Random(seed), statements=statements)
    assert len(program.words) == statements == program.source.count("\n")
    assert program.message.split() == list(program.words)


@pytest.mark.parametrize(
    "program",
    ["", "return x", "def f(x):\n    return open(x)", "def f(x):\n    x = x + 1", "def f(x):\n    return x +",
     "def f(x):\n    return x + 1\n    return x", "def f(x):\n    return x * 99999"],
)  # fmt: skip
def test_what_is_not_of_the_grammar_does_not_run(program: str) -> None:
    assert run(program, "1") is None
    assert not is_runnable(program)


@pytest.mark.parametrize("argument", ["", "x", "1, 2", "f(1)", "[1", "1" * 80, "__import__('os')", "{1: 2}"])
def test_an_argument_is_one_short_literal(argument: str) -> None:
    assert run("def f(x):\n    return len(x)", argument) is None


def test_constants_beyond_the_drawn_ones_run_too() -> None:
    assert run("def f(x):\n    x = x + [42]\n    return [a + 10 for a in x]", "[1]") == "[11, 52]"


def test_about_one_program_in_eight_is_held_out() -> None:
    random = Random(0)
    programs = {random_program(random, statements=2).source for _ in range(5000)}
    assert 0.10 < sum(map(is_held_out, programs)) / len(programs) < 0.15


def test_one_statement_programs_are_never_held_out() -> None:
    random = Random(0)
    assert not any(is_held_out(random_program(random, statements=1).source) for _ in range(500))


def test_trailing_blank_lines_do_not_change_who_is_held_out() -> None:
    random = Random(1)
    programs = [random_program(random).source for _ in range(50)]
    assert [is_held_out(program + "\n") for program in programs] == list(map(is_held_out, programs))
