"""The starter's tokenizer: the grammar's frequent pieces as words, everything else character by character."""

import re
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from azr_async.algorithm.dialogue.compact import MARKERS

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"

SPECIAL_TOKENS: Final = (PAD, END, UNKNOWN, *MARKERS)
FRAGMENTS: Final = (
    "def f(x):\n", "    x = ", "    return ", "    if ", ":\n        x = ", " for a in x", " if a",
    "sorted(", "len(", "sum(", "max(", "min(", "abs(", "str(", "range(", ".upper()", ".replace(", ".count(", "''.join(",
    "[::-1]", "[::2]", ", ", " + ", " - ", " * ", " // ", " % ", " > ", " < ", " == ", " in ",
    "reverse", "slice", "append", "sort", "map", "filter", "repeat", "length", "total", "index", "arithmetic",
    "pair", "upper",
)  # fmt: skip
CHARACTERS: Final = ("\n", *map(chr, range(32, 127)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A standard fast tokenizer; encoding then decoding printable ASCII gives the same text back.

    Nothing downstream knows how it was made: it saves and loads like any other (`AutoTokenizer`).
    """
    vocabulary = {entry: number for number, entry in enumerate((*SPECIAL_TOKENS, *FRAGMENTS, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(FRAGMENTS, key=len, reverse=True)
    pieces = "|".join(map(re.escape, longest_first)) + r"|[\s\S]"
    tokenizer.pre_tokenizer = Split(Regex(pieces), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
