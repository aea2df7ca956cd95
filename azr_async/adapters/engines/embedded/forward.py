"""The three ways in which the engine runs its model: prefill, one step of decoding, scoring."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from azr_async.adapters.engines.embedded.attention import use_grouped_attention
from azr_async.adapters.engines.embedded.cache import SlotCache
from azr_async.errors import EngineError

Ids = NDArray[np.int32] | NDArray[np.int64]

_LARGEST_TRIAL_ERROR: Final = 0.05
"""In probability; bfloat16 stays below, a wrong mask or position does not."""


class Forward:
    """A Hugging Face causal model and the shapes in which it is called."""

    def __init__(self, model: PreTrainedModel) -> None:
        use_grouped_attention(model)
        self._model = model
        self.device = model.device
        self._masked = torch.finfo(model.dtype).min

    def prefill(self, prompts: Sequence[Ids]) -> DynamicCache:
        """Keys and values of all the tokens, right-aligned: every sequence ends at the last column."""
        cache = DynamicCache()
        ids_PT, position_PT, mask_P1TT = self._right_aligned(prompts)
        self._model.base_model(
            input_ids=ids_PT, position_ids=position_PT, attention_mask=mask_P1TT, past_key_values=cache, use_cache=True
        )
        return cache

    def decode(self, last_B: NDArray[np.int64], cached_B: NDArray[np.int64], cache: SlotCache) -> Tensor:
        """[B, V] logits after feeding each row's last token; `cached_B` tokens of each row are in the cache."""
        longest = int(cached_B.max())
        attended = cache.attend(longest)
        first_B = self._tensor(longest - cached_B)
        is_seen_BW = torch.arange(longest + 1, device=self.device) >= first_B[:, None]
        logits_B1V = self._model(
            input_ids=self._tensor(last_B)[:, None],
            position_ids=self._tensor(cached_B)[:, None],
            attention_mask=self._additive(is_seen_BW)[:, None, None],
            past_key_values=attended,
            use_cache=True,
        ).logits
        cache.advance()
        return logits_B1V[:, -1]  # type: ignore[no-any-return]

    def score(self, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
        """Per sequence, the log-probabilities of all tokens but the first, in nats, untempered."""
        ids_PT, position_PT, mask_P1TT = self._right_aligned(sequences)
        logits_PTV = self._model(
            input_ids=ids_PT, position_ids=position_PT, attention_mask=mask_P1TT, use_cache=False
        ).logits
        logp_PTV = torch.log_softmax(logits_PTV[:, :-1].float(), -1)
        logp_PT = logp_PTV.gather(-1, ids_PT[:, 1:, None])[..., 0].cpu().numpy()
        return [row_T[row_T.shape[0] - len(ids) + 1 :] for row_T, ids in zip(logp_PT, sequences, strict=True)]

    def empty_cache(self, *, slots: int, context_tokens: int) -> SlotCache:
        """The cache this model needs; found out by a trial, which also shows that the model works with it.

        Raises EngineError when it does not, or when cached decoding gives other probabilities than a full forward pass.
        """
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        longer = np.arange(min(9, context_tokens)) % vocabulary
        trial = [longer, longer[::-1][: len(longer) // 2]]
        try:
            contents = self.prefill([ids[:-1] for ids in trial])
            self._check_layers(contents)
            cache = SlotCache(contents, slots=2, context_tokens=context_tokens)
            cache.append(contents, torch.arange(2, device=self.device), len(longer) - 1, len(longer) - 1)
            cached_B = np.array([len(ids) - 1 for ids in trial])
            chances_BV = self.decode(np.array([ids[-1] for ids in trial]), cached_B, cache).float().softmax(-1)
            plain_BV = torch.stack([self._model(input_ids=self._tensor(ids)[None]).logits[0, -1] for ids in trial])
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as problem:
            raise EngineError(
                f"{type(self._model).__name__} does not work with the engine's key-value cache ({problem}). "
                "Choose a causal model with full attention and position numbers, such as Qwen, Llama or Mistral."
            ) from problem
        worst = float((plain_BV.float().softmax(-1) - chances_BV).abs().max())
        if worst > _LARGEST_TRIAL_ERROR:
            raise EngineError(
                f"{type(self._model).__name__} gives other probabilities with the engine's key-value cache than "
                f"without (difference {worst:.3f}). Choose another model, such as Qwen, Llama or Mistral."
            )
        try:
            return SlotCache(contents, slots=slots, context_tokens=context_tokens)
        except RuntimeError as problem:
            raise EngineError(
                f"a key-value cache of {slots} x {context_tokens} tokens does not fit ({problem}). "
                "Lower engine.slots or engine.context_tokens."
            ) from problem

    def _check_layers(self, contents: DynamicCache) -> None:
        layers = int(self._model.config.get_text_config().num_hidden_layers)
        if len(contents.layers) != layers:
            raise EngineError(
                f"only {len(contents.layers)} of the model's {layers} layers keep keys and values per token. "
                "The embedded engine serves causal models with full attention in every layer; choose such a model."
            )

    def _right_aligned(self, sequences: Sequence[Ids]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions [P, T] and additive mask [P, 1, T, T]; padding comes first and sees only itself."""
        time = max(len(ids) for ids in sequences)
        ids_PT = np.zeros((len(sequences), time), np.int64)
        for row_T, ids in zip(ids_PT, sequences, strict=True):
            row_T[time - len(ids) :] = ids
        first_P1 = time - np.array([[len(ids)] for ids in sequences])
        column_T = np.arange(time)
        is_seen_PTT = (column_T >= first_P1)[:, None, :] & (column_T <= column_T[:, None])
        is_seen_PTT |= np.eye(time, dtype=np.bool_)
        position_PT = np.maximum(column_T - first_P1, 0)
        return (
            self._tensor(ids_PT),
            self._tensor(position_PT),
            self._additive(self._tensor(is_seen_PTT))[:, None],
        )

    def _additive(self, is_seen: Tensor) -> Tensor:
        return torch.zeros(is_seen.shape, dtype=self._model.dtype, device=self.device).masked_fill_(
            ~is_seen, self._masked
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def check_attention_span(model: PreTrainedModel, context_tokens: int) -> None:
    """Refuse a model whose sliding windows are shorter than the context: the cache attends to everything."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else window is not None
    if slides and window is not None and window < context_tokens:
        raise EngineError(
            f"the model attends to the last {window} tokens in some layers, but engine.context_tokens = "
            f"{context_tokens}. Lower engine.context_tokens to {window}."
        )
