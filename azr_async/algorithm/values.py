"""Plain Python values as text: one canonical encoding to compare, one literal to read.

A value is a *tree* of exact builtin types: None, bool, int, float, complex, str, bytes, list, tuple, dict, set,
frozenset. Anything else - a Counter, a Fraction, an instance, a subclass - is `Unanswerable`: nobody could write it
as an answer. The encoding is JSON in which the types that JSON lacks are tagged objects with one key:

    {"t": [..]} tuple   {"d": [[key, value], ..]} dict   {"s": [..]} set   {"z": [..]} frozenset
    {"b": "hex"} bytes  {"c": [real, imag]} complex      {"f": "nan" | "inf" | "-inf"} float

Two values are equal - same types all the way down, sets unordered, dict order ignored, NaN equal to NaN, -0.0 unlike
0.0 - exactly if their canonical encodings are the same text. Only the standard library is imported, because the
processes that run untrusted programs use this module too.
"""

import json
import math
from collections.abc import Callable
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NamedTuple

MAX_DEPTH: Final = 64
MAX_NODES: Final = 100_000
MAX_INTEGER_BITS: Final = 14_284
"""Python writes and reads integers of at most 4,300 decimal digits."""

_SINGLE: Final[dict[bool | None, str]] = {None: "null", True: "true", False: "false"}

Tree = Any
"""What `json.loads` gives: None, bool, int, float, str, list, dict."""
Plain = Any
"""A Python value, not looked at yet."""


class Unanswerable(ValueError):
    """The value is not plain data that could be written as a literal."""


class TooLarge(ValueError):
    """The value is plain data, but nested too deeply, or too long."""


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
    return _build(_checked(_load(text)))


def read(text: str) -> Reading:
    """Both forms of an encoding that somebody untrusted wrote. Raises ValueError as `decode` does.

    No set and no dict is built from the text, so values chosen to collide in a hash table cost nothing here.
    """
    tree = _checked(_load(text))
    return Reading(_canonical(tree), _literal(tree))


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
    return _close(_checked(_load(first)), _checked(_load(second)), relative_tolerance)


# ---------------------------------------------------------------- value -> text


class _Budget:
    """Counts nodes; a value with shared parts can be exponentially larger than its memory."""

    def __init__(self) -> None:
        self._nodes = 0

    def spend(self, depth: int) -> None:
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise TooLarge(f"nested deeper than {MAX_DEPTH} levels")
        if self._nodes > MAX_NODES:
            raise TooLarge(f"more than {MAX_NODES} parts")


class _Writer:
    """Writes one value as JSON text."""

    def __init__(self, *, is_sorted: bool) -> None:
        self._order: Callable[[list[str]], list[str]] = sorted if is_sorted else list
        self._budget = _Budget()

    def write(self, value: Plain, depth: int = 0, *, is_key: bool = False) -> str:
        self._budget.spend(depth)
        kind = type(value)
        if kind is str:
            return encode_basestring_ascii(value)
        if kind is int:
            return _integer(value)
        if kind is list:
            return f"[{','.join([self.write(item, depth + 1) for item in value])}]"
        if value is None or kind is bool:
            return _SINGLE[value]
        if kind is float:
            return _float(value, is_key=is_key)
        if kind is bytes:
            return f'{{"b":"{value.hex()}"}}'
        if kind is complex:
            return f'{{"c":[{_complex_part(value.real)!r},{_complex_part(value.imag)!r}]}}'
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


def _complex_part(part: float) -> float:
    if not math.isfinite(part) or (part == 0.0 and math.copysign(1.0, part) < 0.0):
        raise Unanswerable("a complex number with an infinite, NaN or negative zero part has no literal")
    return part


# ---------------------------------------------------------------- text -> checked tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"bare {name} in an encoding")


def _load(text: str) -> Tree:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("an encoding nested too deeply") from None


def _checked(tree: Tree) -> Tree:
    _check(tree, _Budget(), depth=0, is_key=False)
    return tree


def _check(tree: Tree, budget: _Budget, *, depth: int, is_key: bool) -> None:
    budget.spend(depth)
    if tree is None or isinstance(tree, bool | str):
        return
    if isinstance(tree, int | float):
        in_range = math.isfinite(tree) if isinstance(tree, float) else tree.bit_length() <= MAX_INTEGER_BITS
        if not in_range:
            raise ValueError("a number out of range")
        return
    if isinstance(tree, list):
        if is_key:
            raise ValueError("a list as a member of a set or a key of a dict")
        for item in tree:
            _check(item, budget, depth=depth + 1, is_key=False)
        return
    if not isinstance(tree, dict) or len(tree) != 1:
        raise ValueError("an object that is not one tag")
    ((tag, content),) = tree.items()
    _check_tagged(tag, content, budget, depth=depth + 1, is_key=is_key)


def _check_tagged(tag: str, content: Tree, budget: _Budget, *, depth: int, is_key: bool) -> None:
    if tag == "f" and content in ("nan", "inf", "-inf"):
        if is_key and content == "nan":
            raise ValueError("NaN as a member of a set or a key of a dict")
    elif tag == "b" and isinstance(content, str):
        if bytes.fromhex(content).hex() != content:
            raise ValueError("bytes not in lower-case hexadecimal")
    elif tag == "c" and isinstance(content, list) and len(content) == 2:
        if not all(type(part) is float for part in content):
            raise ValueError("a complex number needs two floats")
        for part in content:
            _complex_part(part)
    elif tag == "t" and isinstance(content, list):
        for item in content:
            _check(item, budget, depth=depth, is_key=is_key)
    elif (tag == "z" or (tag == "s" and not is_key)) and isinstance(content, list):
        for item in content:
            _check(item, budget, depth=depth, is_key=True)
    elif tag == "d" and not is_key and isinstance(content, list):
        for entry in content:
            if not isinstance(entry, list) or len(entry) != 2:
                raise ValueError("a dict entry needs a key and a value")
            _check(entry[0], budget, depth=depth, is_key=True)
            _check(entry[1], budget, depth=depth, is_key=False)
    else:
        raise ValueError(f"unknown or misplaced tag {tag[:20]!r}")


# ---------------------------------------------------------------- checked tree -> text, value


def _canonical(tree: Tree) -> str:
    if isinstance(tree, str):
        return encode_basestring_ascii(tree)
    if isinstance(tree, list):
        return f"[{','.join(map(_canonical, tree))}]"
    if not isinstance(tree, dict):
        return _SINGLE[tree] if tree is None or isinstance(tree, bool) else repr(tree)
    ((tag, content),) = tree.items()
    if tag == "d":
        entries = sorted(f"[{_canonical(key)},{_canonical(item)}]" for key, item in content)
        return f'{{"d":[{",".join(entries)}]}}'
    if tag in "sz":
        return f'{{"{tag}":[{",".join(sorted(map(_canonical, content)))}]}}'
    return f'{{"{tag}":{_canonical(content)}}}'


def _literal(tree: Tree) -> str:
    if isinstance(tree, list):
        return f"[{', '.join(map(_literal, tree))}]"
    if not isinstance(tree, dict):
        return repr(tree)
    ((tag, content),) = tree.items()
    if tag == "f":
        return str(content)
    if tag == "b":
        return repr(bytes.fromhex(content))
    if tag == "c":
        return repr(complex(*content))
    if tag == "d":
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in content)}}}"
    if tag == "t":
        return f"({', '.join(map(_literal, content))}{',' if len(content) == 1 else ''})"
    members = f"{{{', '.join(map(_literal, sorted(content, key=_reading_order)))}}}" if content else ""
    if tag == "s":
        return members or "set()"
    return f"frozenset({members})"


def _reading_order(tree: Tree) -> tuple[bool, float, str]:
    """Numbers by size, then everything else by its text."""
    if isinstance(tree, int | float) and abs(tree) < 1e300:
        return (False, tree, _canonical(tree))
    return (True, 0.0, _canonical(tree))


def _build(tree: Tree) -> Plain:
    if isinstance(tree, list):
        return [_build(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, content),) = tree.items()
    if tag == "f":
        return float(content)
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "c":
        return complex(*content)
    if tag == "t":
        return tuple(_build(item) for item in content)
    value: Plain
    if tag == "d":
        value = {_build(key): _build(item) for key, item in content}
    else:
        value = (set if tag == "s" else frozenset)(_build(item) for item in content)
    if len(value) != len(content):
        raise ValueError("a set or dict with the same member twice")
    return value


def _close(first: Tree, second: Tree, tolerance: float) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=0.0)
    if isinstance(first, list):
        return len(first) == len(second) and all(_close(*pair, tolerance) for pair in zip(first, second, strict=True))
    if not isinstance(first, dict) or first.keys() != second.keys():
        return bool(first == second)
    ((tag, content),) = first.items()
    other = second[tag]
    if tag in "tc":
        return _close(content, other, tolerance)
    if tag != "d":
        return _canonical(first) == _canonical(second)
    mine, theirs = ({_canonical(key): item for key, item in entries} for entries in (content, other))
    return mine.keys() == theirs.keys() and all(_close(item, theirs[key], tolerance) for key, item in mine.items())
