"""Encodings of values as JSON trees: checked when they come from outside, then turned into text or values.

The form of a tree is described in values.py, which is what others import.
"""

import json
import math
from itertools import pairwise
from json.encoder import encode_basestring_ascii
from typing import Any, Final

MAX_DEPTH: Final = 64
MAX_NODES: Final = 100_000
MAX_INTEGER_BITS: Final = 14_284
"""Python writes and reads integers of at most 4,300 decimal digits."""

SINGLE: Final[dict[bool | None, str]] = {None: "null", True: "true", False: "false"}

Tree = Any
"""What `json.loads` gives: None, bool, int, float, str, list, dict."""
Plain = Any
"""A Python value, not looked at yet."""


class Unanswerable(ValueError):
    """The value is not plain data that could be written as a literal."""


class TooLarge(ValueError):
    """The value is plain data, but nested too deeply, or too long."""


def checked_tree(text: str) -> Tree:
    """The tree of an encoding that anybody may have written. Raises ValueError unless it is well-formed and bounded."""
    tree = _load(text)
    _check(tree, Budget(), depth=0, is_key=False)
    return tree


def canonical_text(tree: Tree) -> str:
    """The one text of a checked tree."""
    if isinstance(tree, str):
        return encode_basestring_ascii(tree)
    if isinstance(tree, list):
        return f"[{','.join(map(canonical_text, tree))}]"
    if not isinstance(tree, dict):
        return SINGLE[tree] if tree is None or isinstance(tree, bool) else repr(tree)
    ((tag, content),) = tree.items()
    if tag == "d":
        entries = sorted(f"[{canonical_text(key)},{canonical_text(item)}]" for key, item in content)
        return f'{{"d":[{",".join(entries)}]}}'
    if tag in "sz":
        return f'{{"{tag}":[{",".join(sorted(map(canonical_text, content)))}]}}'
    return f'{{"{tag}":{canonical_text(content)}}}'


def literal_text(tree: Tree) -> str:
    """Python source text of a checked tree, dicts in their order."""
    if isinstance(tree, list):
        return f"[{', '.join(map(literal_text, tree))}]"
    if not isinstance(tree, dict):
        return repr(tree)
    ((tag, content),) = tree.items()
    if tag == "f":
        return str(content)
    if tag == "b":
        return repr(bytes.fromhex(content))
    if tag == "c":
        # `-1j` would be read as -(1j), whose real part is -0.0.
        return repr(complex(*content)) if content[0] or content[1] >= 0.0 else f"(0{complex(*content)!r})"
    if tag == "d":
        return f"{{{', '.join(f'{literal_text(key)}: {literal_text(item)}' for key, item in content)}}}"
    if tag == "t":
        return f"({', '.join(map(literal_text, content))}{',' if len(content) == 1 else ''})"
    members = f"{{{', '.join(map(literal_text, sorted(content, key=_reading_order)))}}}" if content else ""
    if tag == "s":
        return members or "set()"
    return f"frozenset({members})"


def build(tree: Tree) -> Plain:
    """The value of a checked tree."""
    if isinstance(tree, list):
        return [build(item) for item in tree]
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
        return tuple(build(item) for item in content)
    if tag == "d":
        return {build(key): build(item) for key, item in content}
    return (set if tag == "s" else frozenset)(build(item) for item in content)


def are_close(first: Tree, second: Tree, tolerance: float) -> bool:
    """Whether two checked trees are the same but for small differences of floats."""
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=0.0)
    if isinstance(first, list):
        return len(first) == len(second) and all(
            are_close(*pair, tolerance) for pair in zip(first, second, strict=True)
        )
    if not isinstance(first, dict) or first.keys() != second.keys():
        return bool(first == second)
    ((tag, content),) = first.items()
    other = second[tag]
    if tag in "tc":
        return are_close(content, other, tolerance)
    if tag != "d":
        return canonical_text(first) == canonical_text(second)
    mine, theirs = ({canonical_text(key): item for key, item in entries} for entries in (content, other))
    return mine.keys() == theirs.keys() and all(are_close(item, theirs[key], tolerance) for key, item in mine.items())


def require_characters(text: str) -> None:
    """Raises Unanswerable for half a surrogate pair: two of them would be read back as one character."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unanswerable("a text with half a surrogate pair has no encoding") from None


class Budget:
    """Counts nodes; a value with shared parts can be exponentially larger than its memory."""

    def __init__(self) -> None:
        self._nodes = 0

    def spend(self, depth: int) -> None:
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise TooLarge(f"nested deeper than {MAX_DEPTH} levels")
        if self._nodes > MAX_NODES:
            raise TooLarge(f"more than {MAX_NODES} parts")


def complex_part(part: float) -> float:
    """The part itself, if it can be written. Raises Unanswerable."""
    if not math.isfinite(part) or (part == 0.0 and math.copysign(1.0, part) < 0.0):
        raise Unanswerable("a complex number with an infinite, NaN or negative zero part has no literal")
    return part


def _refuse_constant(name: str) -> None:
    raise ValueError(f"bare {name} in an encoding")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def _load(text: str) -> Tree:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("an encoding nested too deeply") from None


def _check(tree: Tree, budget: Budget, *, depth: int, is_key: bool) -> None:
    budget.spend(depth)
    if isinstance(tree, str):
        require_characters(tree)
        return
    if tree is None or isinstance(tree, bool):
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


def _check_tagged(tag: str, content: Tree, budget: Budget, *, depth: int, is_key: bool) -> None:
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
            complex_part(part)
    elif tag == "t" and isinstance(content, list):
        for item in content:
            _check(item, budget, depth=depth, is_key=is_key)
    elif (tag == "z" or (tag == "s" and not is_key)) and isinstance(content, list):
        for item in content:
            _check(item, budget, depth=depth, is_key=True)
        _require_differences(content)
    elif tag == "d" and not is_key and isinstance(content, list):
        for entry in content:
            if not isinstance(entry, list) or len(entry) != 2:
                raise ValueError("a dict entry needs a key and a value")
            _check(entry[0], budget, depth=depth, is_key=True)
            _check(entry[1], budget, depth=depth, is_key=False)
        _require_differences([key for key, _ in content])
    else:
        raise ValueError(f"unknown or misplaced tag {tag[:20]!r}")


def _require_differences(members: list[Tree]) -> None:
    """Raises ValueError if two are equal, as Python sees it. They are sorted: no hash table is at their mercy."""
    names = sorted(map(_name_of_equals, members))
    if any(first == second for first, second in pairwise(names)):
        raise ValueError("a set or dict with the same member twice")


def _name_of_equals(tree: Tree) -> str:
    """The same text for members that Python takes for one: 1, 1.0, True and (1+0j)."""
    if isinstance(tree, str):
        return encode_basestring_ascii(tree)
    if isinstance(tree, float):
        return repr(int(tree) if tree.is_integer() else tree)
    if not isinstance(tree, dict):
        return repr(int(tree)) if isinstance(tree, bool | int) else "null"
    ((tag, content),) = tree.items()
    if tag == "c" and content[1] == 0.0:
        return _name_of_equals(content[0])
    if tag in "tz":
        names = map(_name_of_equals, content)
        return f"{tag}[{','.join(names if tag == 't' else sorted(names))}]"
    return canonical_text(tree)


def _reading_order(tree: Tree) -> tuple[bool, float, str]:
    """Numbers by size, then everything else by its text."""
    if isinstance(tree, int | float) and abs(tree) < 1e300:
        return (False, tree, canonical_text(tree))
    return (True, 0.0, canonical_text(tree))
