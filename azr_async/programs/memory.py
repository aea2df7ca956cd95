"""How many bytes a learner rank and an engine take on a device: formulas over a model's shape, tested by measuring.

Parts that are there all the time add up; of the phases, which follow each other, the largest counts. `4 H` in a comment
is 4 bytes for each of H elements. What no formula knows (CUDA context, NCCL, fragments) is `reserve_bytes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from azr_async.programs.model_shapes import Shape

Precision = Literal["float32", "bfloat16"]
Phase = Literal["always", "logits", "layers", "end", "prefill", "decode", "push"]
"""When a part is there. A micro-batch ends in logits, goes back through the layers and ends at the embedding."""

FLOAT32_BYTES: Final = 4
PREFILL_TOKENS: Final = 8192
"""Largest padded size of one prefill of the embedded engine; a longer sequence travels alone."""
SPARE_COLUMNS: Final = 64
"""Columns of the embedded engine's cache beyond the context."""

_BYTES: Final = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that takes memory on a device."""

    name: str
    size_bytes: int
    phase: Phase = "always"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """All that one process keeps on one device."""

    parts: tuple[Part, ...]

    @property
    def total_bytes(self) -> int:
        """At the worst moment."""
        phases = {part.phase for part in self.parts} - {"always"}
        return self.phase_bytes("always") + max(map(self.phase_bytes, phases), default=0)

    def phase_bytes(self, phase: str) -> int:
        """Of one phase alone."""
        return sum(part.size_bytes for part in self.parts if part.phase == phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """What decides the memory of a learner rank."""

    precision: Precision
    ranks: int
    is_sharded: bool
    is_offloaded: bool
    """Sharded weights, gradients and moments are in the host's memory."""
    is_checkpointed: bool
    tokens: int
    """Of the largest micro-batch, padding included; all of them may be trained."""
    most_logits: int
    """Logits that are computed at a time."""
    bucket_bytes: int
    """Of a push."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """What decides the memory of an engine, on each of its GPUs."""

    precision: Precision
    slots: int
    context_tokens: int
    bucket_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedServing:
    """What decides whether an engine with a paged cache has room: it takes a share of each GPU, whatever is in it."""

    precision: Precision
    span: int
    """GPUs that hold the weights and the cache together."""
    slots: int
    bucket_bytes: int
    share_bytes: int
    """What the engine may take of each GPU."""


def reserve_bytes(capacity_bytes: int) -> int:
    """Kept free on a device: CUDA context, NCCL buffers, fragments. A rule of thumb, not measured."""
    return 1_500_000_000 + capacity_bytes // 25


def learner_estimate(shape: Shape, learning: Learning) -> Estimate:
    """One learner rank: Adam on float32 master weights, a micro-batch's forward and backward pass, and a push."""
    return Estimate(parts=(*_kept(shape, learning), *_step(shape, learning), _learner_push(shape, learning)))


def engine_estimate(shape: Shape, serving: Serving) -> Estimate:
    """The embedded engine: a cache with a row of `context_tokens` for each slot, whole from the start."""
    size = _BYTES[serving.precision]
    columns = serving.context_tokens + SPARE_COLUMNS
    prompt_tokens = max(PREFILL_TOKENS, serving.context_tokens)
    prefill = prompt_tokens * (cache_bytes_per_token(shape, serving.precision) + _passing_bytes(shape, size))
    mask = serving.context_tokens**2 * (size + 2)  # additive, and two of truth values on the way to it
    # Drawing a token takes the logits, and their float32 form about three times over.
    drawing = serving.slots * shape.vocabulary * (size + 3 * FLOAT32_BYTES)
    moving = serving.slots * columns * shape.key_width * size  # one layer's keys, when the columns run out
    return Estimate(
        parts=(
            Part(name="weights", size_bytes=size * shape.parameters),
            Part(
                name="key-value cache",
                size_bytes=serving.slots * columns * cache_bytes_per_token(shape, serving.precision),
            ),
            Part(name="reading a prompt", size_bytes=prefill + mask, phase="prefill"),
            Part(
                name="drawing tokens",
                size_bytes=drawing + moving + serving.slots * _passing_bytes(shape, size),
                phase="decode",
            ),
            _engine_push(shape, serving.precision, serving.bucket_bytes),
        )
    )


def paged_estimate(shape: Shape, serving: PagedServing) -> Estimate:
    """An engine that gives its cache what its share of the GPU leaves: nothing or less means that it cannot start."""
    size = _BYTES[serving.precision]
    working = PREFILL_TOKENS * _passing_bytes(shape, size)
    working += serving.slots * shape.vocabulary * (size + 3 * FLOAT32_BYTES)
    fixed = (
        Part(name="weights", size_bytes=size * shape.parameters // serving.span),
        Part(name="working memory", size_bytes=working),
        Part(
            name="receiving weights",
            size_bytes=_engine_push(shape, serving.precision, serving.bucket_bytes).size_bytes,
        ),
    )
    left = serving.share_bytes - sum(part.size_bytes for part in fixed)
    return Estimate(parts=(*fixed, Part(name="key-value cache (what is left)", size_bytes=left)))


def cache_bytes_per_token(shape: Shape, precision: Precision, span: int = 1) -> int:
    """Keys and values of all layers, on each of `span` GPUs; a head is not split."""
    heads = -(-shape.key_value_heads // span)
    return 2 * shape.layers * heads * shape.head_width * _BYTES[precision]


def activation_bytes(shape: Shape, learning: Learning) -> int:
    """What the body of the model keeps for its gradient, at the worst moment of its backward pass."""
    stream, inside = _layer_activation(shape, learning)
    gradients = 2 * _BYTES[learning.precision] * shape.intermediate  # of the MLP, whose activations are still there
    if not learning.is_checkpointed:
        return kept_bytes(shape, learning) + learning.tokens * gradients
    # One layer is computed again; the last norm is done with by then, but for the gradient of its input.
    gradients += FLOAT32_BYTES * shape.hidden
    last_norm = 3 * FLOAT32_BYTES * shape.hidden - stream
    return kept_bytes(shape, learning) + learning.tokens * (inside - stream + gradients - last_norm)


def kept_bytes(shape: Shape, learning: Learning) -> int:
    """What the body of the model keeps of its forward pass: all activations, or the layers' inputs."""
    stream, inside = _layer_activation(shape, learning)
    last_norm = 3 * FLOAT32_BYTES * shape.hidden
    rotary = 2 * FLOAT32_BYTES * shape.head_width
    return learning.tokens * (shape.layers * (stream if learning.is_checkpointed else inside) + last_norm + rotary)


def _layer_activation(shape: Shape, learning: Learning) -> tuple[int, int]:
    """Bytes of a token on its way from layer to layer; and what a layer keeps of it, that included.

    Norms compute in float32. Under autocast, which a rank with whole weights in float32 uses for bfloat16, the stream
    stays float32 and each of the five projections keeps its input in bfloat16; else they share it.
    """
    size, hidden = _BYTES[learning.precision], shape.hidden
    if learning.precision == "float32":
        stream, norm = 4 * hidden, 12 * hidden  # input, normalised, weighted
        inputs = 0
    elif learning.is_sharded:
        stream, norm = 2 * hidden, 8 * hidden  # input in float32, normalised, weighted
        inputs = 0
    else:
        stream, norm = 4 * hidden, 8 * hidden  # input, normalised
        inputs = 5 * 2 * hidden
    attention = size * 2 * (shape.query_width + shape.key_width) + 4 * shape.heads  # queries, keys, values, result
    mlp = size * 4 * shape.intermediate  # gate, its activation, up, and their product
    return stream, 2 * (norm + FLOAT32_BYTES) + inputs + attention + mlp


def logits_bytes(shape: Shape, learning: Learning) -> int:
    """Of the blocks of logits that exist at a time, and of the output layer's gradient."""
    size = _BYTES[learning.precision]
    every = learning.tokens * shape.vocabulary
    if every <= learning.most_logits:
        return 3 * FLOAT32_BYTES * every
    # Blockwise, the gradient of the output layer is summed in float32 and then turned into the type of the weights.
    block = min(every, max(learning.most_logits, shape.vocabulary))
    narrow = size if size < FLOAT32_BYTES else 0
    return block * (3 * FLOAT32_BYTES + narrow) + shape.embedding_parameters * (FLOAT32_BYTES + 2 * narrow)


def _kept(shape: Shape, learning: Learning) -> Iterator[Part]:
    mine = -(-shape.parameters // learning.ranks) if learning.is_sharded else shape.parameters
    kept = 0 if learning.is_offloaded else mine
    yield Part(name="master weights", size_bytes=FLOAT32_BYTES * kept)
    yield Part(name="gradients", size_bytes=FLOAT32_BYTES * kept)
    yield Part(name="optimizer moments", size_bytes=2 * FLOAT32_BYTES * kept)


def _step(shape: Shape, learning: Learning) -> Iterator[Part]:
    size = _BYTES[learning.precision]
    together, summed, last = _weights_of_a_step(shape, learning)
    at_logits = at_layers = Part(name="weights put together", size_bytes=together)
    if not learning.is_sharded:
        is_cast = learning.precision == "bfloat16"
        cast = shape.layer_parameters if learning.is_checkpointed else shape.parameters
        at_logits = Part(name="weights in bfloat16", size_bytes=is_cast * size * shape.parameters)
        at_layers = Part(name="weights in bfloat16", size_bytes=is_cast * size * cast)
    yield Part(name="activations kept", size_bytes=kept_bytes(shape, learning), phase="logits")
    yield Part(name="logits", size_bytes=logits_bytes(shape, learning), phase="logits")
    yield replace(at_logits, phase="logits")
    yield Part(name="activations", size_bytes=activation_bytes(shape, learning), phase="layers")
    yield replace(at_layers, phase="layers")
    yield Part(name="gradients not yet added", size_bytes=summed, phase="layers")
    yield Part(name="gradients not yet added", size_bytes=last, phase="end")


def _weights_of_a_step(shape: Shape, learning: Learning) -> tuple[int, int, int]:
    """Bytes of weights that are put together, of gradients beside the layers, and of both at the end of a pass.

    Sharded, what is outside the layers stays together for the whole pass, and so does its gradient; of the layers there
    is one, and the next on its way.
    """
    size = _BYTES[learning.precision]
    if not learning.is_sharded:
        # A tied weight has two gradients; the output layer's waits for the embedding's.
        embedding = FLOAT32_BYTES * shape.embedding_parameters
        layer = (size + FLOAT32_BYTES) * shape.hidden * shape.intermediate
        return 0, layer + embedding * shape.is_tied, embedding * (1 + shape.is_tied)
    gathered = size * (shape.outer_parameters + 2 * shape.layer_parameters)
    summed = size * shape.embedding_parameters + (size + FLOAT32_BYTES) * shape.layer_parameters
    return gathered, summed, (2 * size + FLOAT32_BYTES) * shape.outer_parameters


def _learner_push(shape: Shape, learning: Learning) -> Part:
    # Tensors in the engines' type, put together if they were sharded, wait for the bucket into which they are copied.
    size_bytes = 2 * _largest_bucket(shape, learning.precision, learning.bucket_bytes)
    return Part(name="sending weights", size_bytes=size_bytes, phase="push")


def _engine_push(shape: Shape, precision: Precision, bucket_bytes: int) -> Part:
    return Part(name="receiving weights", size_bytes=_largest_bucket(shape, precision, bucket_bytes), phase="push")


def _largest_bucket(shape: Shape, precision: Precision, bucket_bytes: int) -> int:
    """A tensor that is larger than a bucket has one of its own; all weights may be less than one."""
    size = _BYTES[precision]
    return max(size * shape.embedding_parameters, min(bucket_bytes, size * shape.parameters))


def _passing_bytes(shape: Shape, size: int) -> int:
    """Of a token that passes through a layer without being kept: stream, norm, attention, MLP."""
    widths = 3 * shape.hidden + 2 * (shape.query_width + shape.key_width) + 3 * shape.intermediate
    return size * widths + 2 * FLOAT32_BYTES * shape.hidden
