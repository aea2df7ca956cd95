"""Syntax trees of literals -> their values, without evaluating anything."""

import ast
from typing import Any, Final

Plain = Any

_UNORDERED: Final = {"set": set, "frozenset": frozenset}
_FLOATS: Final = {"inf": float("inf"), "nan": float("nan")}


class NotLiteral(ValueError):
    """The text is Python, but not a literal."""


def literal_value(node: ast.expr) -> Plain:
    """The value of a literal as `values.literal` writes it; raises NotLiteral, or TypeError for an unhashable key.

    Beside the usual displays it knows what has no display of its own: `set()`, `frozenset({..})`, `inf`, `nan`,
    `float('inf')`.
    """
    match node:
        case ast.Constant(value=value) if value is not Ellipsis:
            return value
        case ast.List(elts=items):
            return [literal_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(literal_value(item) for item in items)
        case ast.Set(elts=items):
            return {literal_value(item) for item in items}
        case ast.Dict(keys=keys, values=items):
            if any(key is None for key in keys):
                raise NotLiteral("a dict display with ** is not a literal")
            return {literal_value(key): literal_value(item) for key, item in zip(keys, items, strict=True) if key}
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            number = _number(operand)
            if isinstance(sign, ast.UAdd):
                return number
            # Without the negative zero that -(1j) has, since a complex number with one has no encoding.
            return 0 - number if isinstance(number, complex) else -number
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=ast.Constant(value=complex() as imaginary)):
            real = _number(left)
            return real + imaginary if isinstance(sign, ast.Add) else real - imaginary
        case ast.Name(id=name) if name in _FLOATS:
            return _FLOATS[name]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _call(name, arguments)
    raise NotLiteral(f"{type(node).__name__} is not a literal")


def _number(node: ast.expr) -> Plain:
    value = literal_value(node)
    if type(value) not in (int, float, complex):
        raise NotLiteral("a sign needs a number")
    return value


def _call(name: str, arguments: list[ast.expr]) -> Plain:
    match arguments:
        case [] if name in _UNORDERED:
            return _UNORDERED[name]()
        case [ast.Set() as members] if name == "frozenset":
            return frozenset(literal_value(members))
        case [ast.Constant(value="inf" | "-inf" | "nan" as text)] if name == "float":
            return float(text)
    raise NotLiteral(f"a call of {name[:50]} is not a literal")
