"""The numbers of a model's config.json that decide how much memory it takes, and its parameter count from them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from azr_async.programs import files
from azr_async.starter.suite import STARTER_CHECKPOINT

_NAMES: Final = re.compile(r"(?:Qwen/Qwen2\.5-(?:Coder-)?([\d.]+B)|meta-llama/(?:Meta-)?(Llama-3\.1-8B))(?:-Instruct)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decoder of the Llama family: grouped-query attention, gated MLP, RMS norms, rotary positions."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    is_tied: bool
    """The output layer is the embedding."""
    has_input_bias: bool = False
    """Of the query, key and value projections."""
    has_output_bias: bool = False
    """Of the projection after attention."""
    has_mlp_bias: bool = False
    has_head_norms: bool = False
    """Queries and keys are normalised, each by one weight per element of a head."""

    @property
    def query_width(self) -> int:
        """Elements of all queries of a token."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Elements of all keys of a token, and as many of its values."""
        return self.key_value_heads * self.head_width

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, which is the largest single tensor of these models."""
        return self.vocabulary * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Outside of the layers: embedding, final norm, and the output layer unless it is tied."""
        return self.embedding_parameters * (1 if self.is_tied else 2) + self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        queries, keys, hidden = self.query_width, self.key_width, self.hidden
        attention = 2 * hidden * (queries + keys)
        attention += (queries + 2 * keys) * self.has_input_bias + hidden * self.has_output_bias
        attention += 2 * self.head_width * self.has_head_norms
        mlp = 3 * hidden * self.intermediate + (2 * self.intermediate + hidden) * self.has_mlp_bias
        return attention + mlp + 2 * hidden

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.layers * self.layer_parameters + self.outer_parameters


def _qwen(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> Shape:
    return Shape(
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=hidden // heads,
        is_tied=hidden <= 2048,  # up to 3B
        has_input_bias=True,
    )


PUBLISHED: Final[Mapping[str, Shape]] = {
    "0.5B": _qwen(151_936, 896, 4_864, 24, 14, 2),
    "1.5B": _qwen(151_936, 1_536, 8_960, 28, 12, 2),
    "3B": _qwen(151_936, 2_048, 11_008, 36, 16, 2),
    "7B": _qwen(152_064, 3_584, 18_944, 28, 28, 4),
    "14B": _qwen(152_064, 5_120, 13_824, 48, 40, 8),
    "Llama-3.1-8B": Shape(
        vocabulary=128_256,
        hidden=4_096,
        intermediate=14_336,
        layers=32,
        heads=32,
        key_value_heads=8,
        head_width=128,
        is_tied=False,
    ),
}
"""As in public copies of each model's config.json; the Coder and Instruct variants have those of their size.

They were not compared with the technical reports. The vocabulary is the padded one of the weights, not the tokenizer's.
"""


def shape_of(path: str) -> Shape | None:
    """The shape of the model that `model.path` names; None where it is neither on this machine nor published above.

    Nothing is fetched, and a file that cannot be read as expected is no shape.
    """
    file = _config_file(path)
    if file is None:
        return published_shape(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return shape_from(found) if isinstance(found, dict) else None


def published_shape(hub_id: str) -> Shape | None:
    """The shape of a model that is known by its name."""
    match = _NAMES.fullmatch(hub_id)
    return PUBLISHED.get(match[1] or match[2]) if match else None


def shape_from(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json tells; None for an architecture whose parameters are not counted here."""
    kind = config.get("model_type")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers = [config.get(name) for name in names]
    if kind not in ("llama", "mistral", "qwen2", "qwen3") or not all(_is_count(number) for number in numbers):
        return None
    vocabulary, hidden, intermediate, layers, heads = (int(number) for number in numbers if number is not None)
    key_value_heads, head_width = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    if not _is_count(key_value_heads) or not _is_count(head_width):
        return None
    has_attention_bias = bool(config.get("attention_bias")) and kind in ("llama", "qwen3")
    return Shape(
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        is_tied=bool(config.get("tie_word_embeddings")),
        has_input_bias=has_attention_bias or kind == "qwen2",
        has_output_bias=has_attention_bias,
        has_mlp_bias=bool(config.get("mlp_bias")) and kind == "llama",
        has_head_norms=kind == "qwen3",
    )


def _config_file(path: str) -> Path | None:
    """config.json of a model that is on this machine; a hub id is looked up among what was downloaded before."""
    if path == "starter":
        return STARTER_CHECKPOINT / "config.json"
    folder = files.expanded(path)
    if files.is_dir(folder):
        return folder / "config.json"
    if not files.is_hub_id(path):
        return None
    from huggingface_hub import try_to_load_from_cache  # seldom needed
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number > 0
