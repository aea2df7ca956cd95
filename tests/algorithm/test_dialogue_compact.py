"""The starter's prompt language."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.dialogue.compact import MARKERS, CompactDialogue
from azr_async.messages import Draft, Malformed, Pair, Problem, Task

DIALOGUE = CompactDialogue()
IDENTITY = "def f(x):\n    return x"


def test_markers_stay_visible_in_completions() -> None:
    prompt = DIALOGUE.propose("deduction", [], pairs=4)
    assert prompt.keep_special_tokens
    assert not prompt.is_chat
    assert prompt.text == "<propose><deduction><ans>"


@pytest.mark.parametrize("marker", [*MARKERS, "<pad>", "<eos>", "<unk>"])
def test_a_marker_inside_an_answer_is_malformed(marker: str) -> None:
    assert isinstance(DIALOGUE.read_answer("deduction", f"'{marker}'"), Malformed)
    assert isinstance(DIALOGUE.read_answer("induction", f"{IDENTITY} # {marker}"), Malformed)


@pytest.mark.parametrize("marker", ["<out>", "<ref>", "<ans>", "<solve>", "<unk>"])
def test_a_marker_inside_a_proposal_is_malformed(marker: str) -> None:
    assert isinstance(DIALOGUE.read_proposal("deduction", f"{IDENTITY}<in>'{marker}'", [], pairs=4), Malformed)
    assert isinstance(DIALOGUE.read_proposal("deduction", f"{IDENTITY} # {marker}<in>1", [], pairs=4), Malformed)


@pytest.mark.parametrize("completion", [IDENTITY, f"{IDENTITY}<in>1<in>2", f"{IDENTITY}<in>", "<in>1"])
def test_a_proposal_is_one_program_and_one_input(completion: str) -> None:
    assert isinstance(DIALOGUE.read_proposal("abduction", completion, [], pairs=4), Malformed)


@pytest.mark.parametrize("completion", ["<in>1<in>2<in>3", "1<in>2<in>3<in>4<msg>m", "<in>1<in>2<in>3<msg>m<msg>n",
                                        "<in>1<in>2<in>3<msg> "])  # fmt: skip
def test_an_induction_proposal_is_inputs_and_one_message(completion: str) -> None:
    assert isinstance(DIALOGUE.read_proposal("induction", completion, [identity("deduction")], pairs=4), Malformed)


@given(text=st.lists(st.sampled_from(["<in>", "<out>", "\\", "'", '"', "a", "<", "\n"]), max_size=8).map("".join))
def test_an_output_with_markers_is_shown_without_them_and_means_the_same(text: str) -> None:
    pair = Pair(input="1", output=repr(text), value="")
    prompt = DIALOGUE.solve(Problem(task="abduction", program=IDENTITY, pairs=(pair,))).text
    shown = prompt.removeprefix(f"<solve><abduction>{IDENTITY}<out>").removesuffix("<ans>")
    assert ast.literal_eval(shown) == text
    assert not any(marker in shown for marker in MARKERS)


def test_repeated_inputs_of_an_induction_proposal_count_once() -> None:
    read = DIALOGUE.read_proposal("induction", "<in>1<in>2<in>1<in>3<msg>m", [identity("deduction")], pairs=4)
    assert read == Draft(task="induction", program=IDENTITY, inputs=("1", "2", "3"), message="m")


@pytest.mark.parametrize("nesting", ["(" * 1900, "-" * 1900 + "1", "[" * 95 + "]" * 95, "1+" * 900 + "1", "9" * 3000])
def test_deep_or_long_source_is_answered_not_raised(nesting: str) -> None:
    assert isinstance(DIALOGUE.read_answer("deduction", nesting), str | Malformed)


def identity(task: Task) -> Problem:
    return Problem(task=task, program=IDENTITY, pairs=(Pair(input="1", output="1", value="1"),))
