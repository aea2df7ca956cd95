"""The task library: seeded, bounded, without duplicates; what is given back comes out first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.library import KnownTask, Library, TaskUse, identity_problem, usefulness
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


def test_a_program_that_differs_by_blanks_only_is_known() -> None:
    library = Library(capacity=10, seed=0)
    pair = Pair(input=" 1 ", output="1", value=encode(1))
    assert library.add(problem(1))
    assert not library.add(Problem(task="deduction", program="\n\ndef f(x):  \n\n    return x + 1\n", pairs=(pair,)))


@given(seed=st.integers(0, 2**32), count=st.integers(1, 60), references=st.integers(0, 8))
def test_equal_seeds_draw_equal_references(seed: int, count: int, references: int) -> None:
    libraries = [Library(capacity=20, seed=seed) for _ in range(2)]
    for library in libraries:
        for number in range(count):
            library.add(problem(number))
    draws = [[library.references("deduction", references) for _ in range(3)] for library in libraries]
    assert draws[0] == draws[1]


@given(count=st.integers(0, 80), capacity=st.integers(1, 30), draws=st.integers(0, 40), settles=st.booleans())
def test_it_never_exceeds_its_capacity_and_never_evicts_the_newest(
    count: int, capacity: int, draws: int, settles: bool
) -> None:
    library = Library(capacity=capacity, seed=3)
    for number in range(count):
        library.add(problem(number), group_id=number)
        for _ in range(draws % 5):
            library.references("deduction", 2)
        for version in range(settles):
            library.settle(version)
        assert library.sizes()["deduction"] <= capacity
        assert not library.add(problem(number), group_id=number)


def test_what_nobody_or_everybody_solves_goes_before_what_can_be_learned() -> None:
    library = Library(capacity=40, seed=0)
    for number in range(39):
        library.add(problem(number))
        library.note_result(problem(number), attempts=8, successes=(0, 4, 8)[number % 3])
    library.settle(1)
    library.add(problem(99))
    library.settle(2)
    left = {known.problem.program for known in library.known()}
    assert all(problem(number).program in left for number in range(1, 39, 3))
    assert problem(99).program in left


@given(age=st.floats(0, 1), draws=st.integers(0, 100), attempts=st.integers(0, 50), share=st.floats(0, 1))
def test_use_and_age_only_lower_what_a_task_is_worth(age: float, draws: int, attempts: int, share: float) -> None:
    successes = round(share * attempts)
    fresh = usefulness(TaskUse(attempts=attempts, successes=successes), age=0.0)
    assert 0 < usefulness(TaskUse(draws=draws, attempts=attempts, successes=successes), age=age) <= fresh <= 0.25


@given(order=st.permutations(range(8)), results=st.permutations(range(8)), seed=st.integers(0, 99))
def test_between_two_settlements_the_order_of_events_does_not_matter(
    order: list[int], results: list[int], seed: int
) -> None:
    def played(finds: list[int], solves: list[int]) -> tuple[list[KnownTask], list[tuple[Problem, ...]]]:
        library = Library(capacity=6, seed=seed)
        library.settle(0)
        for number in finds:
            library.add(problem(number % 7), group_id=number)
        for number in solves:
            library.note_result(problem(number % 7), attempts=4, successes=number % 3)
            library.task("deduction", draw=number)
        library.settle(1)
        later = [library.references("deduction", 3, draw=number) for number in range(9)]
        return library.known(), later

    assert played(order, results) == played(sorted(order), sorted(results))


def test_what_was_found_is_drawn_only_after_the_next_settlement() -> None:
    library = Library(capacity=100, seed=0)
    library.settle(0)
    library.add(problem(1), group_id=4)
    assert library.sizes()["deduction"] == 2
    assert library.references("deduction", 6) == (identity_problem("deduction"),)
    library.settle(1)
    assert set(library.references("deduction", 6)) == {identity_problem("deduction"), problem(1)}


def test_the_first_tasks_of_a_kind_are_drawn_at_once() -> None:
    library = Library(capacity=100, seed=0)
    library.settle(0)
    library.add(problem(1, "induction"), group_id=4)
    assert library.task("induction") == problem(1, "induction")


def test_what_was_made_of_a_task_is_told_when_it_settles() -> None:
    library = Library(capacity=100, seed=0)
    library.settle(0)
    library.add(problem(1), group_id=4)
    library.note_result(problem(1), attempts=8, successes=2, reward=0.75)
    assert library.settle(3) == [
        KnownTask(problem=problem(1), use=TaskUse(attempts=8, successes=2, reward=0.75, last_use=2))
    ]
    assert library.settle(4) == []


@given(seed=st.integers(0, 99), count=st.integers(0, 30), draws=st.integers(0, 30))
def test_a_restored_library_draws_and_forgets_as_the_first_one(seed: int, count: int, draws: int) -> None:
    first = Library(capacity=8, seed=seed)
    for number in range(count // 2):
        first.add(problem(number), group_id=number)
    first.settle(1)
    for number in range(draws):
        first.task("deduction", draw=number)
    first.settle(2)
    second = Library.restored(first.known(), capacity=8, seed=seed)
    second.settle(2)
    for library in (first, second):
        for number in range(count // 2, count):
            library.add(problem(number), group_id=number)
        library.references("deduction", 3, draw=7)
        library.settle(3)
    assert first.known() == second.known()
    assert first.references("deduction", 5, draw=1) == second.references("deduction", 5, draw=1)


def test_what_an_earlier_process_found_later_is_known_when_it_was_then() -> None:
    library = Library(capacity=100, seed=0)
    library.settle(4)
    library.expect(problem(1), group_id=9, version=5)
    library.settle(5)
    assert library.sizes()["deduction"] == 1
    library.settle(6)
    assert library.sizes()["deduction"] == 2


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
