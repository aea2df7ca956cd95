"""Responses are taken apart as the grammar in `tags` says."""

import re

from hypothesis import example, given
from hypothesis import strategies as some

from azr_async.algorithm.dialogue.tags import read_blocks
from azr_async.messages import Malformed

GRAMMAR = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
PIECES = ("<think>", "</think>", "<answer>", "</answer>", " ", "\n", "\x1c", "\u2003", "x", "<", "```\ncode\n```\n")


@given(some.lists(some.sampled_from(PIECES), max_size=14).map("".join))
@example("<think></think><answer></answer>")
@example("<think></think><answer></answer>x</answer>\u2003")
@example("<think></think>x</think><answer></answer>")
@example("<think></think><answer></answer></think><answer>")
def test_what_is_well_formed_is_what_the_grammar_matches(text: str) -> None:
    matched = GRAMMAR.fullmatch(text)
    blocks = read_blocks(text)
    if matched is None:
        assert isinstance(blocks, Malformed)
    else:
        assert blocks == read_blocks(f"<think></think><answer>{matched[2]}</answer>")


def test_a_long_thought_takes_one_pass() -> None:
    """A search that tries every place anew would take minutes for this one."""
    assert isinstance(read_blocks("<think>" + "</think>" * 200_000), Malformed)
