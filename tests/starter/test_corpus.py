"""What the starter is pretrained on."""

import ast
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.dialogue.compact import CompactDialogue
from azr_async.messages import TASKS, Draft
from azr_async.starter.corpus import Example, random_example, random_problem
from azr_async.starter.evaluation import is_solved, is_valid
from azr_async.starter.grammar import is_held_out, is_runnable, run
from azr_async.starter.suite import STARTER_SUITE, load_suite

DIALOGUE = CompactDialogue()
HELD_OUT = {problem.program for problem in load_suite(STARTER_SUITE)}

seeds = st.integers(0, 2**32)


def examples(count: int, seed: int = 0, wrong_share: float = 0.0) -> list[Example]:
    random = Random(seed)
    return [random_example(random, wrong_share=wrong_share) for _ in range(count)]


def programs_in(example: Example) -> list[str]:
    """Every program that the example shows or writes."""
    text = f"{example.prompt}<ans>{example.answer}"
    for marker in ("<ref>", "<in>", "<out>", "<msg>", "<propose>", "<solve>", *(f"<{task}>" for task in TASKS)):
        text = text.replace(marker, "<ans>")
    return [part for part in text.split("<ans>") if part.startswith("def ")]


@given(seed=seeds, wrong_share=st.sampled_from([0.0, 0.5]))
def test_no_example_holds_a_held_out_program(seed: int, wrong_share: float) -> None:
    programs = [program for example in examples(10, seed, wrong_share) for program in programs_in(example)]
    assert programs
    assert not HELD_OUT.intersection(programs)
    assert not any(is_held_out(program) for program in programs if is_runnable(program))


@given(seed=seeds)
def test_a_seed_draws_the_same_examples(seed: int) -> None:
    assert examples(5, seed, wrong_share=0.5) == examples(5, seed, wrong_share=0.5)


@given(seed=seeds, task=st.sampled_from(TASKS), held_out=st.booleans())
def test_the_right_answer_to_a_problem_is_judged_right(seed: int, task: str, held_out: bool) -> None:
    problem = random_problem(Random(seed), task, held_out=held_out)  # type: ignore[arg-type]
    answer = {"deduction": problem.pairs[0].output, "abduction": problem.pairs[0].input, "induction": problem.program}
    assert is_held_out(problem.program) == held_out
    assert is_solved(problem, answer[task])
    assert not is_solved(problem, "<ans>")


@given(seed=seeds)
def test_the_pairs_of_an_induction_problem_differ_and_half_are_shown(seed: int) -> None:
    problem = random_problem(Random(seed), "induction", held_out=False)
    assert len({pair.input for pair in problem.pairs}) == 4 == 2 * problem.shown_pairs
    assert [run(problem.program, pair.input) for pair in problem.pairs] == [pair.output for pair in problem.pairs]


def test_most_but_not_all_proposals_of_the_corpus_are_valid() -> None:
    proposals = [example for example in examples(1500) if example.cell[0] == "propose"]
    drafts = [
        DIALOGUE.read_proposal(example.cell[1], example.answer, [], pairs=6)
        for example in proposals
        if example.cell[1] != "induction"
    ]  # fmt: skip
    assert all(isinstance(draft, Draft) for draft in drafts)
    assert 0.7 < sum(map(is_valid, drafts)) / len(drafts) < 0.95


def test_wrong_answers_are_partly_broken_and_partly_lazy() -> None:
    solves = [example for example in examples(3000, wrong_share=0.5) if example.cell[0] == "solve"]
    assert 0.15 < sum(is_broken(example.answer) for example in solves) / len(solves) < 0.30


def test_no_clean_answer_is_broken() -> None:
    assert not any(is_broken(example.answer) for example in examples(500) if example.cell[0] == "solve")


def is_broken(answer: str) -> bool:
    try:
        ast.parse(answer)
    except SyntaxError:
        return True
    return False
