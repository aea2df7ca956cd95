"""What every prompt language promises, on all of them."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.dialogue import DialogueName, make_dialogue
from azr_async.algorithm.dialogue.azr import AzrDialogue
from azr_async.algorithm.dialogue.compact import CompactDialogue
from azr_async.messages import TASKS, Draft, Malformed, Pair, Problem, Task
from azr_async.ports import Dialogue

PIECES = (
    *("<think>", "</think>", "<answer>", "</answer>", "```python\n", "```input\n", "```output\n", "```message\n"),
    *("\n```\n", "````", "<in>", "<out>", "<msg>", "<ans>", "<ref>", "<unk>", "def f(x):\n", "    return x", "[1]"),
    *("(", "\x00", "'"),
)

AnyDialogue = CompactDialogue | AzrDialogue

NAMES: tuple[DialogueName, ...] = ("compact", "azr-chat", "azr-base")
PAIRS = 6

all_dialogues = pytest.mark.parametrize("dialogue", [make_dialogue(name) for name in NAMES], ids=NAMES)
all_tasks = pytest.mark.parametrize("task", TASKS)

literals = st.recursive(
    st.integers() | st.booleans() | st.none() | st.text("abc \\\n'\"`>", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
).map(repr)
argument_lists = st.lists(literals, min_size=1, max_size=3).map(", ".join)
programs = st.builds(
    lambda name, literal, helper: f"{helper}def f({name}):\n    y = {literal}\n\n    return [y, {name}]",
    st.sampled_from(["x", "a, b"]).map(lambda names: names.split(",")[0]),
    literals,
    st.sampled_from(["", "import math\n\n", "class Helper:\n    pass\n\n\n", "def g(x):\n    return x\n\n\n"]),
)
completions = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
messages = st.text("abc xyz.,", min_size=1, max_size=20).map(str.strip).filter(bool)


def as_port(dialogue: Dialogue) -> Dialogue:
    """mypy compares the signatures here."""
    return dialogue


def problem(task: Task, program: str = "def f(x):\n    return x + 700", pairs: int = 4, shown: int = 2) -> Problem:
    made = tuple(Pair(input=f"{9000 + n}", output=f"{9700 + n}", value=f"{9700 + n}") for n in range(pairs))
    return Problem(task=task, program=program, pairs=made, message="the hint", shown_pairs=shown)


@all_dialogues
def test_a_solver_sees_what_is_given_and_not_what_is_asked(dialogue: AnyDialogue) -> None:
    deduction, abduction, induction = (as_port(dialogue).solve(problem(task)).text for task in TASKS)
    assert "x + 700" in deduction
    assert "9000" in deduction
    assert "9700" not in deduction
    assert "x + 700" in abduction
    assert "9700" in abduction
    assert "9000" not in abduction
    assert "x + 700" not in induction
    assert "the hint" in induction


@all_dialogues
def test_induction_shows_the_first_pairs_and_holds_the_others_out(dialogue: AnyDialogue) -> None:
    text = dialogue.solve(problem("induction", shown=2)).text
    assert [f"{9000 + n}" in text and f"{9700 + n}" in text for n in range(4)] == [True, True, False, False]
    assert [f"{9000 + n}" in text or f"{9700 + n}" in text for n in range(4)] == [True, True, False, False]


@all_dialogues
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_proposer_sees_all_its_references(dialogue: AnyDialogue, count: int) -> None:
    references = [problem("deduction", program=f"def f(x):\n    return x - {500 + n}") for n in range(count)]
    text = dialogue.propose("deduction", references, pairs=PAIRS).text
    assert [f"x - {500 + n}" in text for n in range(4)] == [n < count for n in range(4)]


@all_dialogues
@given(answer=literals)
def test_a_written_value_is_read_back(dialogue: AnyDialogue, answer: str) -> None:
    assert dialogue.read_answer("deduction", dialogue.write_answer("deduction", answer)) == answer


@all_dialogues
@given(answer=argument_lists)
def test_a_written_argument_list_is_read_back(dialogue: AnyDialogue, answer: str) -> None:
    assert dialogue.read_answer("abduction", dialogue.write_answer("abduction", answer)) == answer


@all_dialogues
@given(answer=programs)
def test_a_written_program_is_read_back(dialogue: AnyDialogue, answer: str) -> None:
    assert dialogue.read_answer("induction", dialogue.write_answer("induction", answer)) == answer


@all_dialogues
@given(task=st.sampled_from(["deduction", "abduction"]), program=programs, argument=argument_lists)
def test_a_written_proposal_is_read_back(dialogue: AnyDialogue, task: Task, program: str, argument: str) -> None:
    draft = Draft(task=task, program=program, inputs=(argument,))
    assert dialogue.read_proposal(task, dialogue.write_proposal(draft), [], pairs=PAIRS) == draft


@all_dialogues
@given(inputs=st.lists(argument_lists, min_size=3, max_size=PAIRS, unique=True), message=messages)
def test_a_written_induction_proposal_is_read_back(dialogue: AnyDialogue, inputs: Sequence[str], message: str) -> None:
    reference = problem("deduction")
    draft = Draft(task="induction", program=reference.program, inputs=tuple(inputs), message=message)
    assert dialogue.read_proposal("induction", dialogue.write_proposal(draft), [reference], pairs=PAIRS) == draft


@all_dialogues
@pytest.mark.parametrize("inputs", [("1", "2"), ("1", "2", "2", "1"), tuple(map(str, range(PAIRS + 1)))])
def test_induction_needs_three_to_n_different_inputs(dialogue: AnyDialogue, inputs: tuple[str, ...]) -> None:
    draft = Draft(task="induction", program="", inputs=inputs, message="a hint")
    completion = dialogue.write_proposal(draft)
    assert isinstance(dialogue.read_proposal("induction", completion, [problem("deduction")], pairs=PAIRS), Malformed)


@all_dialogues
@pytest.mark.parametrize("answer", ["1,\n2", "[1,\n 2]", "'''a\nb'''"])
def test_an_input_may_have_two_lines(dialogue: AnyDialogue, answer: str) -> None:
    assert dialogue.read_answer("abduction", dialogue.write_answer("abduction", answer)) == answer


@all_dialogues
@all_tasks
@given(completion=completions)
def test_no_completion_breaks_the_reader(dialogue: AnyDialogue, task: Task, completion: str) -> None:
    assert isinstance(dialogue.read_answer(task, completion), str | Malformed)
    proposal = dialogue.read_proposal(task, completion, [problem("deduction")], pairs=PAIRS)
    assert isinstance(proposal, Draft | Malformed)


@all_dialogues
@all_tasks
def test_an_empty_completion_is_malformed(dialogue: AnyDialogue, task: Task) -> None:
    assert isinstance(dialogue.read_answer(task, " \n"), Malformed)
    assert isinstance(dialogue.read_proposal(task, "", [problem("deduction")], pairs=PAIRS), Malformed)
