"""Plain Python values as text: one canonical encoding to compare, one literal to read.

A value is a *tree* of exact builtin types: None, bool, int, float, complex, str, bytes, list, tuple, dict, set,
frozenset. Anything else - a Counter, a Fraction, an instance, a subclass, a text with half a surrogate pair - is
`Unanswerable`: nobody could write it as an answer.
The encoding is JSON in which the types that JSON lacks are tagged objects with one key:

    {"t": [..]} tuple   {"d": [[key, value], ..]} dict   {"s": [..]} set   {"z": [..]} frozenset
    {"b": "hex"} bytes  {"c": [real, imag]} complex      {"f": "nan" | "inf" | "-inf"} float

Two values are equal - same types all the way down, sets unordered, dict order ignored, NaN equal to NaN, -0.0 unlike
0.0 - exactly if their canonical encodings are the same text. Only the standard library is imported, because the
processes that run untrusted programs use this module too.
"""

import math
from collections.abc import Callable
from json.encoder import encode_basestring_ascii
from typing import NamedTuple

from azr_async.algorithm.value_trees import (
    MAX_DEPTH,
    MAX_INTEGER_BITS,
    MAX_NODES,
    SINGLE,
    Budget,
    Plain,
    TooLarge,
    Unanswerable,
    are_close,
    build,
    canonical_text,
    checked_tree,
    complex_part,
    literal_text,
    require_characters,
)

__all__ = [
    "MAX_DEPTH",
    "MAX_NODES",
    "Reading",
    "TooLarge",
    "Unanswerable",
    "decode",
    "encode",
    "encode_in_order",
    "equal",
    "literal",
    "read",
]


class Reading(NamedTuple):
    """A value in both of its forms."""

    canonical: str
    """Key for comparing and caching."""
    literal: str
    """Python source text, dict order as it was produced."""


def encode(value: object) -> str:
    """Canonical text: equal values, and only they, give equal texts. Raises Unanswerable or TooLarge."""
    return _Writer(is_sorted=True).write(value)


def encode_in_order(value: object) -> str:
    """The same without sorting: dicts keep their order, sets are in any. For a process whose word `read` checks."""
    return _Writer(is_sorted=False).write(value)


def decode(text: str) -> object:
    """The value that `text` encodes. Raises ValueError for anything but a bounded, well-formed encoding."""
    return build(checked_tree(text))


def read(text: str) -> Reading:
    """Both forms of an encoding that somebody untrusted wrote. Raises ValueError as `decode` does.

    No set and no dict is built from the text, so values chosen to collide in a hash table cost nothing here.
    """
    tree = checked_tree(text)
    return Reading(canonical_text(tree), literal_text(tree))


def literal(value: object) -> str:
    """Python source text of a plain value; the same in every process, because sets are written sorted."""
    return read(encode_in_order(value)).literal


def equal(first: str, second: str, relative_tolerance: float = 0.0) -> bool:
    """Whether two canonical encodings mean the same value.

    With a tolerance, finite floats may differ by that share of the larger one, wherever the position is not a set's
    member or a dict's key; types must agree all the same. Raises ValueError for text that is no encoding.
    """
    if first == second or relative_tolerance <= 0.0:
        return first == second
    return are_close(checked_tree(first), checked_tree(second), relative_tolerance)


class _Writer:
    """Writes one value as JSON text."""

    def __init__(self, *, is_sorted: bool) -> None:
        self._order: Callable[[list[str]], list[str]] = sorted if is_sorted else list
        self._budget = Budget()

    def write(self, value: Plain, depth: int = 0, *, is_key: bool = False) -> str:
        self._budget.spend(depth)
        kind = type(value)
        if kind is str:
            require_characters(value)
            return encode_basestring_ascii(value)
        if kind is int:
            return _integer(value)
        if kind is list:
            return f"[{','.join([self.write(item, depth + 1) for item in value])}]"
        if value is None or kind is bool:
            return SINGLE[value]
        if kind is float:
            return _float(value, is_key=is_key)
        if kind is bytes:
            return f'{{"b":"{value.hex()}"}}'
        if kind is complex:
            return f'{{"c":[{complex_part(value.real)!r},{complex_part(value.imag)!r}]}}'
        return self._write_container(value, depth + 1, is_key=is_key)

    def _write_container(self, value: Plain, depth: int, *, is_key: bool) -> str:
        kind = type(value)
        if kind is tuple:
            return f'{{"t":[{",".join([self.write(item, depth, is_key=is_key) for item in value])}]}}'
        if kind is dict:
            entries = [
                f"[{self.write(key, depth, is_key=True)},{self.write(item, depth)}]" for key, item in value.items()
            ]
            return f'{{"d":[{",".join(self._order(entries))}]}}'
        if kind is set or kind is frozenset:
            members = self._order([self.write(item, depth, is_key=True) for item in value])
            return f'{{"{"s" if kind is set else "z"}":[{",".join(members)}]}}'
        raise Unanswerable(f"a {kind.__name__[:80]} is not plain data")


def _integer(value: int) -> str:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise TooLarge("an integer of more than 4300 digits")
    return repr(value)


def _float(value: float, *, is_key: bool) -> str:
    if math.isfinite(value):
        return repr(value)
    if is_key and value != value:
        raise Unanswerable("NaN as a member of a set or a key of a dict")
    return f'{{"f":"{value!r}"}}'
