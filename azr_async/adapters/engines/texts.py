"""Prompt text to tokens, tokens to completion text, and when a stop text has been written."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from azr_async.errors import EngineError
from azr_async.messages import Prompt

TokenIds = NDArray[np.int32] | NDArray[np.int64]

_PART_OF_A_CHARACTER: Final = "\ufffd"


class Texts:
    """One tokenizer and the tokens at which its model ends an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> None:
        self.end_ids = end_ids
        self._tokenizer = tokenizer
        self._may_end: dict[tuple[tuple[str, ...], int], bool] = {}

    def prompt_ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """[T] ids. A user's turn goes through the chat template; plain text gets no special tokens added."""
        text = prompt.text
        if prompt.is_chat:
            if not getattr(self._tokenizer, "chat_template", None):
                raise EngineError(
                    "the prompts are chat turns, but the model's tokenizer has no chat template. "
                    "Set model.dialogue to azr-base, or use an instruction-tuned model."
                )
            turns = [{"role": "user", "content": text}]
            text = str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if len(ids) == 0:
            raise EngineError(f"the prompt {text!r} has no tokens. Check model.dialogue: it must fit the tokenizer.")
        return ids

    def completion_text(self, prompt: Prompt, ids_T: TokenIds) -> str:
        """What was written: without the end token, up to and including the first stop text."""
        return _cut(self._decoded(prompt, ids_T), prompt.stop)

    def has_stopped(self, prompt: Prompt, ids_T: TokenIds) -> bool:
        """Is a stop text in the completion? Asked after each token, so only the last token can have finished one."""
        question = (prompt.stop, int(ids_T[-1]))
        if question not in self._may_end:
            self._may_end[question] = self._may_end_a_stop(*question)
        return self._may_end[question] and any(stop in self._decoded(prompt, ids_T) for stop in prompt.stop)

    def _decoded(self, prompt: Prompt, ids_T: TokenIds) -> str:
        kept = ids_T[:-1] if len(ids_T) and int(ids_T[-1]) in self.end_ids else ids_T
        return str(
            self._tokenizer.decode(
                kept.tolist(),
                skip_special_tokens=not prompt.keep_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def _may_end_a_stop(self, stops: tuple[str, ...], token_id: int) -> bool:
        """Cheap and never wrongly False: does the token's own text hold a stop's last character, or a piece of one?"""
        piece = str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        # A tokenizer may strip white space from a lone token, so a stop that ends in it can end anywhere.
        return _PART_OF_A_CHARACTER in piece or any(stop[-1:].isspace() or stop[-1:] in piece for stop in stops)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def end_ids(named: object, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: those `named` by a generation configuration, and the tokenizer's own."""
    ids = named if isinstance(named, list) else [named]
    return frozenset(int(one) for one in [*ids, tokenizer.eos_token_id] if one is not None)
