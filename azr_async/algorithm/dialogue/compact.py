"""The starter's prompt language: a role, a task, the given parts between markers, and the answer after `<ans>`.

    <solve><deduction>PROGRAM<in>INPUT<ans>                      -> OUTPUT
    <solve><abduction>PROGRAM<out>OUTPUT<ans>                    -> INPUT
    <solve><induction><in>INPUT<out>OUTPUT...<msg>MESSAGE<ans>   -> PROGRAM
    <propose><deduction><ref>PROGRAM<in>INPUT<out>OUTPUT...<ans> -> PROGRAM<in>INPUT     (abduction likewise)
    <propose><induction>PROGRAM<ans>                             -> <in>INPUT<in>INPUT...<msg>MESSAGE

Each marker is one token of the starter's tokenizer, so most conversations stay under 100 tokens. A completion is
well-formed when it has exactly these parts; whether they are Python is for the sandbox to say, which parses them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from azr_async.messages import ROLES, TASKS, Draft, Malformed, Problem, Prompt, Task

MARKERS: Final = (*(f"<{name}>" for name in (*ROLES, *TASKS)), "<ref>", "<in>", "<out>", "<msg>", "<ans>")
PAIRS_LEAST: Final = 3
"""An induction problem needs pairs to show and pairs to hold out."""

_SOURCE_CHARACTERS_MOST: Final = 2000
# The tokenizer's own special tokens count too: what cannot be typed must not pass for Python.
_MARKER: Final = re.compile("|".join(map(re.escape, (*MARKERS, "<pad>", "<eos>", "<unk>"))))


@dataclass(frozen=True, slots=True)
class CompactDialogue:
    """Fulfils `ports.Dialogue` in the starter's prompt language."""

    def propose(self, task: Task, references: Sequence[Problem], *, pairs: int) -> Prompt:
        """Ask for a new task; how many induction inputs is left to the model (`PAIRS_LEAST` to `pairs`)."""
        if task == "induction":
            return _prompt(f"<propose><induction>{_shown(references[0].program)}<ans>")
        shown = "".join(
            f"<ref>{_shown(reference.program)}<in>{_shown(reference.pairs[0].input)}<out>{_shown(reference.pairs[0].output)}"
            for reference in references
        )
        return _prompt(f"<propose><{task}>{shown}<ans>")

    def read_proposal(
        self, task: Task, completion: str, references: Sequence[Problem], *, pairs: int
    ) -> Draft | Malformed:
        """Take a proposer's completion apart."""
        if task == "induction":
            return _read_induction(completion, references[0].program, pairs)
        parts = completion.split("<in>")
        if len(parts) != 2:
            return Malformed(reason=f"{len(parts) - 1} inputs instead of one")
        program, argument = parts
        problem = _defect(program, is_program=True) or _defect(argument, is_program=False)
        return Malformed(reason=problem) if problem else Draft(task=task, program=program, inputs=(argument.strip(),))

    def solve(self, problem: Problem) -> Prompt:
        """Ask for the missing part of `problem`."""
        program, first = _shown(problem.program), problem.pairs[0]
        if problem.task == "deduction":
            return _prompt(f"<solve><deduction>{program}<in>{_shown(first.input)}<ans>")
        if problem.task == "abduction":
            return _prompt(f"<solve><abduction>{program}<out>{_shown(first.output)}<ans>")
        shown = problem.pairs[: problem.shown_pairs]
        examples = "".join(f"<in>{_shown(pair.input)}<out>{_shown(pair.output)}" for pair in shown)
        message = f"<msg>{_MARKER.sub('', problem.message)}" if problem.message else ""
        return _prompt(f"<solve><induction>{examples}{message}<ans>")

    def read_answer(self, task: Task, completion: str) -> str | Malformed:
        """The whole completion is the answer."""
        problem = _defect(completion, is_program=task == "induction")
        return Malformed(reason=problem) if problem else completion.strip()

    def write_proposal(self, draft: Draft) -> str:
        """The completion that `read_proposal` reads as this draft."""
        inputs = "".join(f"<in>{argument}" for argument in draft.inputs)
        return f"{inputs}<msg>{draft.message}" if draft.task == "induction" else f"{draft.program}{inputs}"

    def write_answer(self, task: Task, answer: str) -> str:
        """The completion that `read_answer` reads as this answer."""
        return answer


def _read_induction(completion: str, program: str, pairs: int) -> Draft | Malformed:
    body, *messages = completion.split("<msg>")
    before, *inputs = body.split("<in>")
    distinct = tuple(dict.fromkeys(argument.strip() for argument in inputs))
    if before or len(messages) != 1 or not messages[0].strip():
        return Malformed(reason="not of the form <in>...<in>...<msg>...")
    if not PAIRS_LEAST <= len(distinct) <= max(pairs, PAIRS_LEAST):
        return Malformed(reason=f"{len(distinct)} distinct inputs; between {PAIRS_LEAST} and {pairs} are asked for")
    if _MARKER.search(messages[0]):
        return Malformed(reason="a marker inside the message")
    for argument in distinct:
        if problem := _defect(argument, is_program=False):
            return Malformed(reason=problem)
    return Draft(task="induction", program=program, inputs=distinct, message=messages[0].strip())


def _defect(source: str, *, is_program: bool) -> str:
    """What is wrong with a part of a completion; empty when nothing is."""
    part = "program" if is_program else "value"
    if not source.strip():
        return f"empty {part}"
    if _MARKER.search(source):
        return f"a marker inside the {part}"
    if len(source) > _SOURCE_CHARACTERS_MOST:
        return f"{part} of {len(source)} characters; at most {_SOURCE_CHARACTERS_MOST} are read"
    return ""


def _shown(source: str) -> str:
    """Source for a prompt. In a literal `<` only occurs inside quotes, where `\\x3c` means the same to Python."""
    return _MARKER.sub(lambda marker: "\\x3c" + marker[0][1:], source)


def _prompt(text: str) -> Prompt:
    return Prompt(text=text, keep_special_tokens=True)
