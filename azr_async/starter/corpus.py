"""What the starter's model is pretrained on: conversations about the grammar's programs.

Two corpora: clean, and with a share of wrong solver answers. The second buries ability under bad habits, as web
text does with a large model's, and leaves something for verifiable reward to dig out.
"""

from dataclasses import dataclass
from random import Random
from typing import Final

from azr_async.algorithm.dialogue.compact import CompactDialogue
from azr_async.algorithm.library import identity_problem
from azr_async.messages import CELLS, Cell, Draft, Pair, Problem, Task
from azr_async.starter.grammar import (
    GrammarProgram,
    is_held_out,
    random_input,
    random_kind,
    random_program,
    run,
)

PROPOSED_INPUTS: Final = 4
"""Inputs in an induction proposal; half of them are shown to solvers."""

_CELL_SHARES: Final[dict[Cell, float]] = {
    ("propose", "deduction"): 0.10,
    ("propose", "abduction"): 0.10,
    ("propose", "induction"): 0.06,
    ("solve", "deduction"): 0.28,
    ("solve", "abduction"): 0.22,
    ("solve", "induction"): 0.24,
}
_PROPOSAL_SLOPPINESS: Final = 0.07
"""Share of statements or inputs of the wrong kind: proposals must sometimes fail, or failing could not be unlearned."""
_INPUT_SLOPPINESS: Final = 0.04
_IDENTITY_REFERENCE_SHARE: Final = 0.04
_MESSAGE_SHARE: Final = 0.9
_BROKEN_SHARE: Final = 0.3
_DIALOGUE: Final = CompactDialogue()


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from."""

    cell: Cell
    prompt: str
    answer: str


def random_example(random: Random, *, wrong_share: float = 0.0) -> Example:
    """Draw a conversation about programs that are not held out.

    Args:
        random: the only source of chance.
        wrong_share: probability that a solver's answer is wrong: broken text, an echo, half a program.
    """
    role, task = random.choices(CELLS, [_CELL_SHARES[cell] for cell in CELLS])[0]
    if role == "propose":
        return _proposal(random, task)
    problem = random_problem(random, task, held_out=False)
    answers = {"deduction": problem.pairs[0].output, "abduction": problem.pairs[0].input, "induction": problem.program}
    answer = answers[task]
    if random.random() < wrong_share:
        answer = _wrong(random, problem, answer)
    return Example(("solve", task), _DIALOGUE.solve(problem).text, _DIALOGUE.write_answer(task, answer))


def random_problem(random: Random, task: Task, *, held_out: bool) -> Problem:
    """Draw a problem about a program that runs. `Pair.value` is left empty: prompts do not need it."""
    wanted = PROPOSED_INPUTS if task == "induction" else 1
    while True:
        program = random_program(random)
        pairs = _random_pairs(random, program, wanted) if is_held_out(program.source) == held_out else ()
        if len(pairs) == wanted:
            break
    message = program.message if random.random() < _MESSAGE_SHARE or held_out else ""
    return Problem(
        task=task,
        program=program.source,
        pairs=pairs,
        message=message if task == "induction" else "",
        shown_pairs=max(1, wanted // 2),
    )


def _random_pairs(random: Random, program: GrammarProgram, wanted: int) -> tuple[Pair, ...]:
    """Distinct pairs, fewer than wanted when the program keeps failing."""
    pairs: dict[str, Pair] = {}
    for _ in range(5 * wanted):
        argument = random_input(random, program.takes)
        output = run(program.source, argument)
        if output is not None:
            pairs.setdefault(argument, Pair(input=argument, output=output, value=""))
        if len(pairs) == wanted:
            break
    return tuple(pairs.values())


def _proposal(random: Random, task: Task) -> Example:
    if task == "induction":
        reference = random_program(random)
        while is_held_out(reference.source):
            reference = random_program(random)
        inputs = [_proposed_input(random, reference, _INPUT_SLOPPINESS) for _ in range(PROPOSED_INPUTS)]
        draft = Draft(task=task, program=reference.source, inputs=tuple(inputs), message=reference.message)
        problem = Problem(task=task, program=reference.source, pairs=(Pair(input="", output="", value=""),))
        return _proposal_example(task, (problem,), draft)
    program = random_program(random, sloppiness=_PROPOSAL_SLOPPINESS)
    while is_held_out(program.source):
        program = random_program(random, sloppiness=_PROPOSAL_SLOPPINESS)
    argument = _proposed_input(random, program, _PROPOSAL_SLOPPINESS)
    draft = Draft(task=task, program=program.source, inputs=(argument,))
    references = tuple(_reference(random, task) for _ in range(random.choices([0, 1, 2], [0.05, 0.85, 0.1])[0]))
    return _proposal_example(task, references, draft)


def _proposal_example(task: Task, references: tuple[Problem, ...], draft: Draft) -> Example:
    prompt = _DIALOGUE.propose(task, references, pairs=PROPOSED_INPUTS)
    return Example(("propose", task), prompt.text, _DIALOGUE.write_proposal(draft))


def _proposed_input(random: Random, program: GrammarProgram, sloppiness: float) -> str:
    return random_input(random, random_kind(random) if random.random() < sloppiness else program.takes)


def _reference(random: Random, task: Task) -> Problem:
    """A solved problem to differ from; sometimes the identity, which is all that self-play has at its start."""
    if random.random() < _IDENTITY_REFERENCE_SHARE:
        return identity_problem(task)
    return random_problem(random, task, held_out=False)


def _wrong(random: Random, problem: Problem, answer: str) -> str:
    """An answer as bad habits give it: lazy, an echo, or broken where being lazy would be right."""
    first = problem.pairs[0]
    if problem.task == "deduction":
        lazy = _without_last_statement(problem.program, first.input)
        is_right = lazy == first.output
    elif problem.task == "abduction":
        lazy = first.output
        is_right = run(problem.program, lazy) == first.output
    else:
        lazy = _without_first_statement(problem.program)
        is_right = all(run(lazy, pair.input) == pair.output for pair in problem.pairs)
    if is_right or random.random() < _BROKEN_SHARE:
        return answer.replace("return ", "return (", 1) if problem.task == "induction" else answer[:-1] + ")"
    return lazy


def _without_first_statement(program: str) -> str:
    """The lazy program: one statement is hoped to do."""
    head, *body = program.split("\n")
    return "\n".join([head, body[-1] if len(body) > 1 else "    return x"])


def _without_last_statement(program: str, argument: str) -> str:
    """What the program would return if its last statement were forgotten."""
    *earlier, _ = program.split("\n")
    shortened = "\n".join([*earlier, "    return x"])
    return run(shortened, argument) or argument
