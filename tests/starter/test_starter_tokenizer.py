"""The starter's tokenizer, fresh and reloaded as anybody would."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from azr_async.starter.suite import STARTER_CHECKPOINT
from azr_async.starter.tokenizer import FRAGMENTS, SPECIAL_TOKENS, build_tokenizer

FRESH = build_tokenizer()
SHIPPED = AutoTokenizer.from_pretrained(STARTER_CHECKPOINT)

both = pytest.mark.parametrize("tokenizer", [FRESH, SHIPPED], ids=["fresh", "shipped"])
texts = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, *FRAGMENTS]) | st.text([*map(chr, range(32, 127)), "\n"], max_size=8), max_size=8
).map("".join)


@both
@given(text=texts)
def test_decoding_gives_the_encoded_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


@both
def test_each_marker_is_one_token_and_nothing_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("".join(SPECIAL_TOKENS))["input_ids"]) == len(SPECIAL_TOKENS)


@given(text=texts)
def test_the_shipped_tokenizer_is_what_the_code_makes(text: str) -> None:
    assert SHIPPED(text)["input_ids"] == FRESH(text)["input_ids"]
    assert len(SHIPPED) == len(FRESH)


def test_a_saved_tokenizer_loads_without_knowing_how_it_was_made(tmp_path: Path) -> None:
    FRESH.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<eos>", "<pad>", "<unk>")
    assert loaded("def f(x):\n    return x[::-1]")["input_ids"] == FRESH("def f(x):\n    return x[::-1]")["input_ids"]


def test_a_conversation_of_the_starter_is_short() -> None:
    assert len(FRESH("<solve><deduction>def f(x):\n    return x[::-1]<in>[1, 2]<ans>")["input_ids"]) < 20
