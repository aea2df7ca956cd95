"""The task library: seeded, bounded, without duplicates; what is given back comes out first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.library import Library, identity_problem
from azr_async.algorithm.values import encode
from azr_async.messages import Pair, Problem, Task


def problem(number: int, task: Task = "deduction") -> Problem:
    pair = Pair(input=str(number), output=str(number), value=encode(number))
    return Problem(task=task, program=f"def f(x):\n    return x + {number}", pairs=(pair,))


def test_a_new_library_holds_the_identity_triplet_and_nothing_for_induction() -> None:
    library = Library(capacity=10, seed=0)
    assert library.sizes() == {"deduction": 1, "abduction": 1, "induction": 0}
    assert library.references("deduction", 6) == (identity_problem("deduction"),)


def test_a_known_task_is_not_kept_twice() -> None:
    library = Library(capacity=10, seed=0)
    assert library.add(problem(1))
    assert not library.add(problem(1))
    assert library.add(problem(1, "abduction"))


@given(seed=st.integers(0, 2**32), count=st.integers(1, 60), references=st.integers(0, 8))
def test_equal_seeds_draw_equal_references(seed: int, count: int, references: int) -> None:
    libraries = [Library(capacity=20, seed=seed) for _ in range(2)]
    for library in libraries:
        for number in range(count):
            library.add(problem(number))
    draws = [[library.references("deduction", references) for _ in range(3)] for library in libraries]
    assert draws[0] == draws[1]


@given(count=st.integers(0, 80), capacity=st.integers(1, 30), draws=st.integers(0, 40))
def test_it_never_exceeds_its_capacity_and_never_evicts_the_newest(count: int, capacity: int, draws: int) -> None:
    library = Library(capacity=capacity, seed=3)
    for number in range(count):
        library.add(problem(number))
        for _ in range(draws % 5):
            library.references("deduction", 2)
        assert library.sizes()["deduction"] <= capacity
        assert not library.add(problem(number))


def test_references_are_drawn_without_replacement() -> None:
    library = Library(capacity=100, seed=0)
    for number in range(9):
        library.add(problem(number))
    drawn = library.references("deduction", 6)
    assert len({item.key for item in drawn}) == 6


def test_a_task_that_is_given_back_is_drawn_next() -> None:
    library = Library(capacity=100, seed=0)
    for number in range(50):
        library.add(problem(number))
    library.give_back(problem(7))
    assert library.task("deduction") == problem(7)


def test_an_induction_proposal_gets_one_program_of_the_other_kinds() -> None:
    (reference,) = Library(capacity=10, seed=0).references("induction", 6)
    assert reference.task in ("deduction", "abduction")


def test_a_discarded_task_is_gone() -> None:
    library = Library(capacity=10, seed=0)
    library.discard(identity_problem("deduction"))
    assert "deduction" not in library.solvable()
    with pytest.raises(IndexError):
        library.task("deduction")
