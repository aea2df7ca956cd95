"""The prompts of Absolute Zero (arXiv:2505.03335, appendix D) in our own words, for models that know language.

The model thinks in `<think>` and answers in `<answer>`, with fenced blocks named python, input, output and message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from azr_async.algorithm.dialogue.tags import (
    ANSWER_END,
    Block,
    fenced,
    only_text,
    read_blocks,
    response,
    texts_labelled,
)
from azr_async.messages import Draft, Malformed, Problem, Prompt, Task

PAIRS_LEAST: Final = 3
"""An induction problem needs pairs to show and pairs to hold out."""

BANNED: Final = (
    "random numbers", "the time or date", "files and folders", "the network", "environment variables", "threads",
    "processes", "printing or reading input", "hash() or id()",
)  # fmt: skip
"""What makes a program unsafe or its answer differ from run to run."""

_ANSWER_LABEL: Final[dict[Task, str]] = {"deduction": "output", "abduction": "input", "induction": "python"}
_BASE_OPENING: Final = "<think>"


@dataclass(frozen=True, slots=True)
class AzrDialogue:
    """Fulfils `ports.Dialogue` with prompts in English."""

    style: Literal["chat", "base"]
    """`chat`: the prompt is a user's turn for the chat template. `base`: a transcript that the model continues."""
    allowed_imports: tuple[str, ...]
    """Named to the proposer."""

    def propose(self, task: Task, references: Sequence[Problem], *, pairs: int) -> Prompt:
        """Ask for a new task."""
        if task == "induction":
            return self._prompt(_ask_inputs(references[0].program, pairs))
        return self._prompt(_ask_program(task, references, self.allowed_imports))

    def read_proposal(
        self, task: Task, completion: str, references: Sequence[Problem], *, pairs: int
    ) -> Draft | Malformed:
        """Take a proposer's completion apart."""
        blocks = read_blocks(self._opened(completion))
        if isinstance(blocks, Malformed):
            return blocks
        if task == "induction":
            return _read_induction(blocks, references[0].program, pairs)
        program, argument = only_text(blocks, "python"), only_text(blocks, "input")
        if isinstance(program, Malformed):
            return program
        if isinstance(argument, Malformed):
            return argument
        return Draft(task=task, program=program, inputs=(argument.strip(),))

    def solve(self, problem: Problem) -> Prompt:
        """Ask for the missing part of `problem`."""
        asks = {"deduction": _ask_output, "abduction": _ask_input, "induction": _ask_rule}
        return self._prompt(asks[problem.task](problem))

    def read_answer(self, task: Task, completion: str) -> str | Malformed:
        """The block that the task asks for."""
        blocks = read_blocks(self._opened(completion))
        answer = blocks if isinstance(blocks, Malformed) else only_text(blocks, _ANSWER_LABEL[task])
        return answer if isinstance(answer, Malformed) or task == "induction" else answer.strip()

    def write_proposal(self, draft: Draft) -> str:
        """The completion that `read_proposal` reads as this draft."""
        blocks = [Block("input", argument) for argument in draft.inputs]
        if draft.task == "induction":
            return self._completion([*blocks, Block("message", draft.message)])
        return self._completion([Block("python", draft.program), *blocks])

    def write_answer(self, task: Task, answer: str) -> str:
        """The completion that `read_answer` reads as this answer."""
        return self._completion([Block(_ANSWER_LABEL[task], answer)])

    def _prompt(self, request: str) -> Prompt:
        text = f"{request}\n\n{_FORM}"
        if self.style == "chat":
            return Prompt(text=text, is_chat=True)
        # A base model does not know how to stop, so generation ends at the closing tag.
        return Prompt(text=f"{_TRANSCRIPT}\n\nUser: {text}\n\nAssistant: {_BASE_OPENING}", stop=(ANSWER_END,))

    def _opened(self, completion: str) -> str:
        return completion if self.style == "chat" else _BASE_OPENING + completion

    def _completion(self, blocks: Sequence[Block]) -> str:
        text = response("", blocks)
        return text if self.style == "chat" else text.removeprefix(_BASE_OPENING)


_TRANSCRIPT: Final = (
    "What follows is a talk between a User, who sets a task, and an Assistant, who reasons about it step by step "
    "before giving the result."
)
_FORM: Final = (
    "Reason first, between <think> and </think>. Then give the result between <answer> and </answer>, in fenced blocks "
    "with exactly the names shown above. Write nothing after </answer>."
)
_PROGRAM_RULES: Final = """\
The program
- has a function named `f` with at least one parameter, which returns its result; it may have others, and classes;
- gives the same result on every run, within a few seconds;
- returns plain Python data: numbers, text, lists, tuples, dicts, sets, True, False or None;
- must not use: {banned};
- may import only: {imports}."""


def _ask_program(task: Task, references: Sequence[Problem], allowed_imports: Sequence[str]) -> str:
    """Deduction and abduction: a program and an input."""
    if task == "deduction":
        aim = "sees the program and the input, and has to work out what the function returns"
    else:
        aim = "sees the program and what it returns, and has to find an input that leads there"
    rules = _PROGRAM_RULES.format(banned=", ".join(BANNED), imports=", ".join(allowed_imports) or "nothing")
    examples = "\n\n".join(f"Example {number}\n{_example(one)}" for number, one in enumerate(references, start=1))
    novelty = f"It must differ from these examples in what it does, not only in its names:\n\n{examples}"
    return (
        f"Set a programming puzzle. A strong solver {aim}. Aim for a puzzle that takes careful thought: one that the "
        f"solver gets right sometimes, but not always. {novelty if references else ''}\n{rules}\n\n"
        f"Answer with two blocks: the program, and the arguments of the call, as Python literals separated by commas. "
        f'For `f("abc", [1, 2])` the arguments are `"abc", [1, 2]`.\n{_form("python", "def f(...): ...")}\n'
        f"{_form('input', '...')}"
    )


def _ask_inputs(program: str, pairs: int) -> str:
    """Induction: inputs for a given program, and a message."""
    return (
        f"Here is a Python program.\n{fenced('python', program)}\n\nMake a puzzle out of it. A solver will see some of "
        "your inputs with what the program returns for them, and your message, but not the program; from these they "
        f"have to write a program that treats all of your inputs alike. Give {pairs} different inputs that together "
        "show everything the program does, special cases included, and a message that hints at the idea without "
        "giving the code away.\n\n"
        f"Answer with {pairs} input blocks, each holding the arguments of one call as Python literals separated by "
        f"commas, and one message block.\n{_form('input', '...')}\n{_form('message', '...')}"
    )


def _ask_output(problem: Problem) -> str:
    return (
        f"Work out what this program's function `f` returns.\n{fenced('python', problem.program)}\n"
        f"It is called with these arguments:\n{fenced('input', _literal(problem.pairs[0].input))}\n\n"
        f"Answer with one block holding the returned value as a Python literal, text in quotes.\n"
        f"{_form('output', '...')}"
    )


def _ask_input(problem: Problem) -> str:
    return (
        f"Find arguments for which this program's function `f` returns the value below.\n"
        f"{fenced('python', problem.program)}\nThe value:\n{fenced('output', _literal(problem.pairs[0].output))}\n\n"
        "Any arguments that lead there are right. Answer with one block holding them as Python literals separated by "
        f"commas; text in quotes.\n{_form('input', '...')}"
    )


def _ask_rule(problem: Problem) -> str:
    shown = "\n".join(
        f"{fenced('input', _literal(pair.input))}\n{fenced('output', _literal(pair.output))}"
        for pair in problem.pairs[: problem.shown_pairs]
    )
    hint = f"A hint from its author:\n{fenced('message', problem.message)}\n\n" if problem.message else ""
    return (
        f"A hidden program turned each of these inputs into the output below it.\n{shown}\n\n{hint}"
        "Write a program whose function `f` does the same, also for inputs that are not shown. Answer with one block.\n"
        f"{_form('python', 'def f(...): ...')}"
    )


def _example(problem: Problem) -> str:
    first = problem.pairs[0]
    parts = (("python", problem.program), ("input", first.input), ("output", first.output))
    return "\n".join(fenced(label, text) for label, text in parts)


def _form(label: str, text: str) -> str:
    return fenced(label, text)


def _literal(text: str) -> str:
    """A literal without the text that ends generation: inside quotes, `\\x3c` means `<` to Python."""
    return text.replace(ANSWER_END, "\\x3c" + ANSWER_END[1:])


def _read_induction(blocks: Sequence[Block], program: str, pairs: int) -> Draft | Malformed:
    inputs = tuple(dict.fromkeys(text.strip() for text in texts_labelled(blocks, "input")))
    message = only_text(blocks, "message")
    if isinstance(message, Malformed):
        return message
    if not all(inputs) or not PAIRS_LEAST <= len(inputs) <= max(pairs, PAIRS_LEAST):
        return Malformed(reason=f"{len(inputs)} different inputs; between {PAIRS_LEAST} and {pairs} are asked for")
    return Draft(task="induction", program=program, inputs=inputs, message=message.strip())
