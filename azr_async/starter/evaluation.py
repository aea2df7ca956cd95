"""How good the starter is: greedy answers to held-out problems, and how many of its proposals are valid.

Judged with the grammar's own table, so a right answer in Python beyond the grammar counts as wrong here; the pipeline's
evaluation, which judges in the sandbox, can only be kinder.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from azr_async.algorithm.dialogue.compact import CompactDialogue
from azr_async.algorithm.judging import judged_pairs
from azr_async.messages import TASKS, Draft, Malformed, Problem, Task
from azr_async.starter.corpus import PROPOSED_INPUTS, random_problem
from azr_async.starter.grammar import read_value, run

_ANSWER_TOKENS_MOST = 48
_BATCH = 150
_DIALOGUE = CompactDialogue()


@dataclass(frozen=True, slots=True)
class Report:
    """Shares between 0 and 1, per task kind."""

    accuracy: dict[Task, float]
    """Of held-out problems solved by the greedy answer."""
    valid: dict[Task, float]
    """Of proposals, sampled at temperature 1, that are well-formed and run."""
    problems: int

    @property
    def mean_accuracy(self) -> float:
        """Over the task kinds."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def standard_error(self) -> float:
        """Of the mean accuracy, treating problems as independent."""
        mean = self.mean_accuracy
        return float((mean * (1.0 - mean) / max(1, self.problems)) ** 0.5)


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    proposals_per_task: int,
    seed: int,
) -> Report:
    """Measure a model on the held-out problems; `seed` draws the proposals."""
    answers = _generate(model, tokenizer, [_DIALOGUE.solve(problem).text for problem in problems], is_greedy=True)
    solved = [is_solved(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
    random = Random(f"{seed} proposals")
    torch.manual_seed(seed)
    by_task = {
        task: [ok for problem, ok in zip(problems, solved, strict=True) if problem.task == task] for task in TASKS
    }
    return Report(
        accuracy={task: _share(by_task[task]) for task in TASKS},
        valid={task: _valid_share(model, tokenizer, task, proposals_per_task, random) for task in TASKS},
        problems=len(problems),
    )


def is_solved(problem: Problem, completion: str) -> bool:
    """Is this completion right, as far as the grammar's table can tell?"""
    answer = _DIALOGUE.read_answer(problem.task, completion)
    if isinstance(answer, Malformed):
        return False
    first = problem.pairs[0]
    if problem.task == "deduction":
        return repr(read_value(answer)) == first.output
    if problem.task == "abduction":
        return run(problem.program, answer) == first.output
    return all(run(answer, pair.input) == pair.output for pair in judged_pairs(problem))


def is_valid(draft: Draft | Malformed) -> bool:
    """Does every input of the proposal run?"""
    return isinstance(draft, Draft) and all(run(draft.program, argument) is not None for argument in draft.inputs)


def _valid_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, count: int, random: Random
) -> float:
    references = [random_problem(random, task, held_out=False) for _ in range(count)]
    prompts = [_DIALOGUE.propose(task, [reference], pairs=PROPOSED_INPUTS).text for reference in references]
    completions = _generate(model, tokenizer, prompts, is_greedy=False)
    return _share(
        is_valid(_DIALOGUE.read_proposal(task, completion, [reference], pairs=PROPOSED_INPUTS))
        for completion, reference in zip(completions, references, strict=True)
    )


@torch.inference_mode()
def _generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, is_greedy: bool
) -> list[str]:
    """One completion per prompt, in order, special tokens kept except the end; unended ones are empty text."""
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts = [""] * len(prompts)
    for start in range(0, len(by_length), _BATCH):
        numbers = by_length[start : start + _BATCH]
        batch = tokenizer([prompts[number] for number in numbers], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=_ANSWER_TOKENS_MOST,
            do_sample=not is_greedy,
        )
        for number, token_ids in zip(numbers, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            texts[number] = _text_until_end(tokenizer, token_ids)
    return texts


def _text_until_end(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    if tokenizer.eos_token_id not in token_ids:
        return ""
    kept = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(kept, skip_special_tokens=False))


def _share(outcomes: Iterable[bool]) -> float:
    known = list(outcomes)
    return sum(known) / max(1, len(known))
