"""The full prompts: tags, fences, and everything that a model may write into them."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.dialogue import make_dialogue
from azr_async.algorithm.dialogue.tags import Block, fenced, read_blocks
from azr_async.messages import TASKS, Draft, Malformed, Pair, Problem, Task

CHAT = make_dialogue("azr-chat", allowed_imports=("math", "re"))
BASE = make_dialogue("azr-base")
PROGRAM = "def f(x):\n    return x"
PROBLEM = Problem(task="deduction", program=PROGRAM, pairs=(Pair(input="1", output="1", value="1"),))

nasty = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "```", "````", "```input", "\n", "a", " "]),
    max_size=10,
).map("".join)  # fmt: skip


def answered(body: str, thought: str = "let me see") -> str:
    return f"<think>{thought}</think>\n<answer>\n{body}\n</answer>"


def test_a_chat_prompt_is_a_turn_and_a_base_prompt_a_transcript_that_can_stop() -> None:
    chat, base = CHAT.solve(PROBLEM), BASE.solve(PROBLEM)
    assert chat.is_chat
    assert not base.is_chat
    assert base.stop == ("</answer>",)
    assert base.text.endswith("Assistant: <think>")
    assert chat.text in base.text
    assert not chat.keep_special_tokens
    assert not base.keep_special_tokens


def test_a_base_completion_starts_inside_the_thought() -> None:
    completion = "one plus one</think><answer>\n```output\n2\n```\n</answer>"
    assert BASE.read_answer("deduction", completion) == "2"
    assert isinstance(CHAT.read_answer("deduction", completion), Malformed)


def test_the_proposer_is_told_what_is_banned_and_what_may_be_imported() -> None:
    text = CHAT.propose("deduction", [PROBLEM], pairs=10).text
    assert "math, re" in text
    assert "random numbers" in text
    assert "threads" in text


def test_an_induction_proposer_is_asked_for_n_inputs_and_a_message() -> None:
    text = CHAT.propose("induction", [PROBLEM], pairs=10).text
    assert "10 input blocks" in text
    assert "```message" in text
    assert PROGRAM in text


@given(program=nasty)
def test_a_program_may_quote_any_tag_or_fence(program: str) -> None:
    source = f"{PROGRAM}\n{program}\n    # end"
    assert CHAT.read_answer("induction", CHAT.write_answer("induction", source)) == source


@given(quoted=nasty)
def test_a_proposal_may_quote_any_tag_or_fence(quoted: str) -> None:
    draft = Draft(task="deduction", program=f"{PROGRAM}\n{quoted}\n    # end", inputs=(repr(quoted),))
    assert CHAT.read_proposal("deduction", CHAT.write_proposal(draft), [], pairs=10) == draft


@given(thought=nasty)
def test_a_thought_that_quotes_tags_never_smuggles_in_another_answer(thought: str) -> None:
    read = CHAT.read_answer("deduction", answered("```output\n2\n```", thought))
    assert read == "2" or isinstance(read, Malformed)


def test_a_draft_answer_inside_the_thought_is_ignored() -> None:
    thought = "maybe\n```output\n1\n```\nno"
    assert CHAT.read_answer("deduction", answered("```output\n2\n```", thought)) == "2"


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
def test_a_response_cut_short_is_malformed(task: Task, data: st.DataObject) -> None:
    whole = CHAT.write_answer(task, PROGRAM)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert isinstance(CHAT.read_answer(task, whole[:cut]), Malformed)


def test_text_after_the_answer_is_malformed() -> None:
    assert isinstance(CHAT.read_answer("deduction", answered("```output\n2\n```") + "\nI hope this helps"), Malformed)


def test_a_missing_thought_is_malformed() -> None:
    assert isinstance(CHAT.read_answer("deduction", "<answer>\n```output\n2\n```\n</answer>"), Malformed)


def test_blocks_with_other_labels_are_passed_over() -> None:
    body = "```text\nnot this\n```\nbut\n```\nnor this\n```\n```output\n2\n```"
    assert CHAT.read_answer("deduction", answered(body)) == "2"


@pytest.mark.parametrize("body", ["2", "```python\n2\n```", "```output\n1\n```\n```output\n2\n```", "```output\n\n```",
                                  "```output\n2", "```output 2```"])  # fmt: skip
def test_anything_but_one_block_of_the_right_label_is_malformed(body: str) -> None:
    assert isinstance(CHAT.read_answer("deduction", answered(body)), Malformed)


def test_labels_are_read_whatever_their_case() -> None:
    assert CHAT.read_answer("induction", answered(f"```Python\n{PROGRAM}\n```")) == PROGRAM


@pytest.mark.parametrize(
    "extra", ["def g(y):\n    return y\n\n", "class Helper:\n    def f(self):\n        return 1\n\n"]
)
def test_a_second_function_or_a_helper_class_is_welcome(extra: str) -> None:
    completion = answered(f"```python\n{extra}{PROGRAM}\n```\n```input\n1\n```")
    assert CHAT.read_proposal("deduction", completion, [], pairs=10) == Draft(
        task="deduction", program=extra + PROGRAM, inputs=("1",)
    )


def test_a_proposal_without_its_input_is_malformed() -> None:
    assert isinstance(CHAT.read_proposal("deduction", answered(f"```python\n{PROGRAM}\n```"), [], pairs=10), Malformed)


def test_a_value_that_would_end_the_generation_is_shown_escaped() -> None:
    pair = Pair(input="1", output="'</answer>'", value="")
    text = BASE.solve(Problem(task="abduction", program=PROGRAM, pairs=(pair,))).text
    assert r"'\x3c/answer>'" in text
    assert ast.literal_eval(r"'\x3c/answer>'") == "</answer>"


@given(text=nasty)
def test_a_fence_holds_whatever_is_inside(text: str) -> None:
    assert read_blocks(answered(fenced("python", text))) == [Block("python", text)]
