"""Messages to bytes and back: MessagePack, tagged by type name, arrays as raw bytes.

A message is a map of one entry, `{type name: {field: value}}`; a nested dataclass is a map of its fields. An array
is an extension whose code is its dtype and whose data are its little-endian bytes. Nothing is ever unpickled, and
whatever arrives is either a whole, valid message or a `MessageError`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from azr_async.errors import MessageError
from azr_async.messages import Message

KINDS: Final[Mapping[str, type[Message]]] = {kind.__name__: kind for kind in get_args(Message)}

LONGEST_LIST: Final = 262_144
"""Entries of one list. msgpack makes room for a list before it has seen the entries, and lists may nest."""

_DTYPES: Final = {1: np.dtype("<i4"), 2: np.dtype("<f4")}
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}
_TOO_LONG: Final[Mapping[str, str]] = {
    "RolloutBatch": "Lower flow.solve_samples or flow.propose_samples",
    "EvaluationResult": "Use an evaluation.suite of fewer tasks",
}
_WHAT_TO_DO: Final = "It was refused whole. Run the same version of azr_async on both ends."

Reader = Callable[[object], Any]
T = TypeVar("T")

_READERS: Final[dict[type, Mapping[str, Reader]]] = {}


def encode(message: Message) -> bytes:
    """The message as bytes.

    Raises:
        MessageError: it holds something that cannot travel, such as an array of another dtype, a lone surrogate or
            a list that `decode` would refuse.
    """
    name = type(message).__name__
    if KINDS.get(name) is not type(message):
        raise MessageError(f"{name} is not a message. Send one of {', '.join(KINDS)}.")
    try:
        return bytes(msgpack.packb({name: message}, default=_packable))
    except (TypeError, ValueError, OverflowError) as problem:
        raise MessageError(f"{name} cannot be sent: {problem}. Look at the stage that built it.") from problem


def decode(data: bytes | memoryview, *, limit_bytes: int) -> Message:
    """The message in `data`. Its arrays are read-only views of the bytes that arrived.

    Raises:
        MessageError: too large, truncated, of an unknown kind, or with unknown, missing or wrong fields.
    """
    if len(data) > limit_bytes:
        raise MessageError(f"A message of {len(data)} bytes is over the limit of {limit_bytes}. {_WHAT_TO_DO}")
    match _unpacked(data):
        case dict() as tagged if len(tagged) == 1:
            [(name, fields)] = tagged.items()
        case _:
            raise MessageError(f"A message must be a map of one entry, its kind. {_WHAT_TO_DO}")
    if name not in KINDS:
        raise MessageError(f"{str(name)[:60]!r} is not a kind of message. {_WHAT_TO_DO}")
    message: Message = _built(KINDS[name], fields)
    return message


def _packable(value: object) -> object:
    """What msgpack is to write in place of a value that it does not know."""
    if isinstance(value, np.ndarray):
        code = _CODES.get(value.dtype)
        if code is None or value.ndim != 1:
            raise TypeError(f"an array of {value.dtype} in {value.ndim} dimensions is not a row of int32 or float32")
        return msgpack.ExtType(code, value.tobytes())
    if dataclasses.is_dataclass(value):
        fields = {name: getattr(value, name) for name in _readers(type(value))}
        for name, content in fields.items():
            if isinstance(content, tuple) and len(content) > LONGEST_LIST:
                raise _too_long(type(value).__name__, name, len(content))
        return fields
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value of type {type(value).__name__} has no place on the wire")


def _too_long(kind: str, field: str, count: int) -> MessageError:
    what_to_do = _TOO_LONG.get(kind, "Look at the stage that built it")
    return MessageError(
        f"{kind}.{field} has {count} entries, more than the {LONGEST_LIST} that travel in one message. {what_to_do}."
    )


def _unpacked(data: bytes | memoryview) -> object:
    try:
        return msgpack.unpackb(
            data, use_list=False, ext_hook=_array, max_array_len=min(len(data), LONGEST_LIST), max_map_len=len(data)
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as problem:
        raise MessageError(f"A message is not valid MessagePack: {str(problem)[:200]}. {_WHAT_TO_DO}") from problem


def _array(code: int, data: bytes) -> NDArray[Any]:
    if code not in _DTYPES:
        raise ValueError(f"array code {code} is unknown")
    return np.frombuffer(data, _DTYPES[code])


def _built(kind: type[T], fields: object) -> T:
    if not isinstance(fields, dict):
        raise MessageError(f"{kind.__name__}: expected a map of fields, got {type(fields).__name__}. {_WHAT_TO_DO}")
    readers = _readers(kind)
    if fields.keys() != readers.keys():
        odd = ", ".join(sorted(str(name)[:60] for name in fields.keys() ^ readers.keys()))
        raise MessageError(f"{kind.__name__}: missing or unknown fields: {odd[:400]}. {_WHAT_TO_DO}")
    values = {}
    for name, value in fields.items():
        try:
            values[name] = readers[name](value)
        except ValidationError as problem:
            reason = problem.errors(include_url=False, include_input=False)[0]["msg"]
            raise MessageError(f"{kind.__name__}.{name}: {reason}. {_WHAT_TO_DO}") from problem
    return kind(**values)


def _readers(kind: type) -> Mapping[str, Reader]:
    """How to read each field of a dataclass; made once for each."""
    if kind not in _READERS:
        hints = get_type_hints(kind, include_extras=True)
        _READERS[kind] = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}
    return _READERS[kind]


def _reader(annotation: Any) -> Reader:  # noqa: ANN401  an annotation has no type of its own
    """What turns a field's raw value into the annotated type, or raises ValidationError or MessageError.

    Nested dataclasses are built here: pydantic's strict mode refuses a map for them, its lax mode takes "1" for 1.
    """
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return partial(_built, annotation)
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and dataclasses.is_dataclass(arguments[0]):
        items = _strict(tuple[Any, ...])
        return lambda value: tuple(_built(arguments[0], item) for item in items(value))
    return _strict(annotation)


def _strict(annotation: Any) -> Reader:  # noqa: ANN401
    return TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python
