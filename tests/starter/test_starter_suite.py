"""The shipped held-out suite and the shipped model."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from azr_async.algorithm.dialogue.compact import CompactDialogue
from azr_async.errors import CheckpointError
from azr_async.messages import TASKS
from azr_async.starter.evaluation import evaluate
from azr_async.starter.grammar import is_held_out, run
from azr_async.starter.suite import STARTER_CHECKPOINT, STARTER_SUITE, draw_suite, load_suite, write_suite

SUITE = load_suite(STARTER_SUITE)


def test_the_suite_has_three_hundred_distinct_problems_of_each_kind() -> None:
    assert Counter(problem.task for problem in SUITE) == dict.fromkeys(TASKS, 300)
    assert len({problem.key for problem in SUITE}) == len(SUITE)


def test_every_problem_of_the_suite_is_held_out_and_true() -> None:
    assert all(is_held_out(problem.program) for problem in SUITE)
    assert all(run(problem.program, pair.input) == pair.output for problem in SUITE for pair in problem.pairs)
    assert all(pair.value for problem in SUITE for pair in problem.pairs)


def test_the_suite_is_the_one_that_the_code_draws(tmp_path: Path) -> None:
    write_suite(tmp_path / "suite.jsonl", draw_suite())
    assert load_suite(tmp_path / "suite.jsonl") == SUITE


GOOD_ROW = {"task": "deduction", "program": "", "input": "", "output": "1", "pairs": [], "message": ""}
BAD_ROWS = [[], {"task": "deduction"}, *(GOOD_ROW | bad for bad in ({"task": "x"}, {"output": "f()"}, {"output": "["}))]


@pytest.mark.parametrize("line", ["{", *map(json.dumps, BAD_ROWS)])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text(STARTER_SUITE.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(CheckpointError, match="line 2"):
        load_suite(path)


def test_a_missing_suite_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="azr_async starter"):
        load_suite(tmp_path / "none.jsonl")


def test_the_shipped_model_suits_the_serving_engines() -> None:
    config = AutoConfig.from_pretrained(STARTER_CHECKPOINT)
    assert config.head_dim in {32, 64}
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert sum(file.stat().st_size for file in STARTER_CHECKPOINT.iterdir()) < 2_000_000


def test_every_prompt_of_the_suite_leaves_room_for_an_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STARTER_CHECKPOINT)
    prompts = [CompactDialogue().solve(problem).text for problem in SUITE]
    assert max(map(len, tokenizer(prompts)["input_ids"])) + 64 <= 256


def test_the_shipped_model_solves_some_but_far_from_all() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(STARTER_CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(STARTER_CHECKPOINT)
    report = evaluate(model, tokenizer, SUITE, proposals_per_task=40, seed=0)
    assert model.dtype == torch.float32
    assert 0.12 < report.mean_accuracy < 0.28
    assert min(report.valid.values()) > 0.5
