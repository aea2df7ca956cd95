"""Where self-play stood: written and read back, and the library that it stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.library import Library, TaskUse, identity_problem
from azr_async.algorithm.values import encode
from azr_async.errors import CheckpointError
from azr_async.messages import Pair, Problem
from azr_async.programs.standing import Standing, library_of, read, written

COUNTS = st.integers(0, 2**40)
USES = st.builds(
    TaskUse,
    draws=COUNTS,
    attempts=COUNTS,
    successes=COUNTS,
    reward=st.none() | st.floats(-1, 1),
    last_use=st.none() | COUNTS,
)
STANDINGS = st.builds(
    Standing,
    version=COUNTS,
    run_seed=COUNTS,
    seed=st.integers(0, 2**63 - 1),
    first_group=COUNTS,
    next_round=st.integers(max_value=-1),
    newest_task=COUNTS,
    tasks=st.dictionaries(st.binary(min_size=16, max_size=16), USES, max_size=5),
)


def adding(number: int) -> Problem:
    pair = Pair(input="1", output=str(1 + number), value=encode(1 + number))
    return Problem(task="deduction", program=f"def f(x):\n    return x + {number}", pairs=(pair,))


def standing_of(library: Library) -> Standing:
    return Standing(version=3, run_seed=1, seed=1, first_group=0, next_round=-1, newest_task=9, tasks=library.uses())


@given(standing=STANDINGS)
def test_what_was_written_is_read(standing: Standing) -> None:
    assert read(written(standing)) == standing


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "version": 3}'])
def test_what_is_no_standing_is_told(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"selfplay\.json of the checkpoint cannot be read"):
        read(text)


def test_the_library_is_made_again_from_the_journals_tasks() -> None:
    library = Library(capacity=10, seed=1)
    for number in range(5):
        library.add(adding(number))
    library.discard(identity_problem("abduction"))
    library.references("deduction", 3)
    again = library_of(standing_of(library), [adding(number) for number in reversed(range(9))], capacity=10)
    assert again.known() == library.known()


def test_a_journal_without_the_tasks_is_told() -> None:
    library = Library(capacity=10, seed=1)
    library.add(adding(1))
    with pytest.raises(CheckpointError, match="1 of 3 tasks that the checkpoint of version 3 knew"):
        library_of(standing_of(library), [adding(2)], capacity=10)
