"""Python as programs see it: builtins and modules without those parts that lead out of a program's own affairs.

A program gets a *facade* of each module that it may import: a module with the same contents, but for the modules that
the real one happens to hold and nobody may import (`collections._sys`, `statistics.random`). Functions that look
attributes up by name, or evaluate text, are replaced by ones that know the gate's rules.
"""

import _string  # type: ignore[import-not-found]
import builtins
import functools
import operator
import string
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from azr_async.adapters.sandbox.inside.gate import HIDDEN_NAMES, VARS, is_hidden_attribute

Namespace = dict[str, Any]

_ABSENT: Final = "open input breakpoint exit quit help eval exec compile copyright credits license __loader__ __spec__"
ABSENT_BUILTINS: Final = frozenset(_ABSENT.split())
_IMPORTED_BY_THE_INTERPRETER: Final = frozenset({"_strptime", "copyreg", "unicodedata"})
"""What functions written in C import by the rules of the program that calls them: no program gets hold of these."""
_NOT_SHOWN: Final = frozenset({"__builtins__", "__cached__", "__file__", "__loader__", "__path__", "__spec__"})


def builtin_names(allowed_imports: Collection[str]) -> Namespace:
    """The builtins of a program: nothing that reaches files or the terminal, and only allowed imports."""
    real_import, real_getattr, real_vars = builtins.__import__, builtins.getattr, builtins.vars
    modules = _Facades(allowed_imports)

    def guarded_import(
        name: str,
        context: Namespace | None = None,
        local: Namespace | None = None,
        wanted: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        if name in _IMPORTED_BY_THE_INTERPRETER and name not in allowed_imports:
            return real_import(name, context, local, wanted or (), level)
        if name not in allowed_imports:
            raise ImportError(f"import of {name} is not allowed")
        return modules.named(name if wanted else name.partition(".")[0])

    def guarded_getattr(owner: object, name: str, *default: object) -> object:
        _refuse_hidden(name)
        return real_getattr(owner, name, *default)

    def guarded_vars(*owner: object) -> Mapping[str, Any]:
        if not owner:
            return sys._getframe(1).f_locals
        found: Mapping[str, Any] = real_vars(*owner)
        if type(found) is dict:
            return found
        return {name: value for name, value in found.items() if not is_hidden_attribute(name)}

    names = {name: value for name, value in vars(builtins).items() if name not in ABSENT_BUILTINS}
    names |= {"__import__": guarded_import, "getattr": guarded_getattr, "vars": guarded_vars, VARS: guarded_vars}
    return names


def guard_library(names: Namespace) -> None:
    """Replace the library's own ways around the gate, for every program that runs in this process.

    Args:
        names: a program's builtins; annotations that are evaluated see these.
    """
    real_field: Callable[..., Any] = string.Formatter.get_field
    real_evaluate: Callable[..., Any] = typing.ForwardRef._evaluate

    def get_field(self: string.Formatter, field: str, *values: Any) -> Any:  # noqa: ANN401
        for is_attribute, name in _string.formatter_field_name_split(field)[1]:
            if is_attribute:
                _refuse_hidden(name)
        return real_field(self, field, *values)

    def evaluate(self: typing.ForwardRef, known: Namespace | None, *more: Any, **named: Any) -> Any:  # noqa: ANN401
        for name in _names_in(self.__forward_code__):
            if name in HIDDEN_NAMES or is_hidden_attribute(name):
                raise NameError(f"{name} is not allowed")
        return real_evaluate(self, {**(known or {}), "__builtins__": names}, *more, **named)

    string.Formatter.get_field = get_field  # type: ignore[method-assign,assignment]
    typing.ForwardRef._evaluate = evaluate  # type: ignore[method-assign,assignment]


class _Facades:
    """Facades of the modules that programs may import, and of what belongs to them."""

    def __init__(self, allowed_imports: Collection[str]) -> None:
        self._allowed = allowed_imports
        self._made: dict[types.ModuleType, types.ModuleType] = {}
        packages = {name.partition(".")[0] for name in allowed_imports}
        self._named = {name: self._facade(sys.modules[name]) for name in {*allowed_imports, *packages}}

    def named(self, name: str) -> types.ModuleType:
        return self._named[name]

    def _facade(self, module: types.ModuleType) -> types.ModuleType:
        if module in self._made:
            return self._made[module]
        facade = self._made[module] = types.ModuleType(module.__name__, module.__doc__)
        for name, value in vars(module).items():
            if isinstance(value, types.ModuleType):
                if self._belongs(value):
                    setattr(facade, name, self._facade(value))
            elif name not in _NOT_SHOWN:
                setattr(facade, name, _REPLACED.get(id(value), value))
        return facade

    def _belongs(self, module: types.ModuleType) -> bool:
        return any(module.__name__ == name or module.__name__.startswith(f"{name}.") for name in self._allowed)


def _attrgetter(*names: str) -> Callable[[Any], Any]:
    for name in names:
        for part in _plain(name).split("."):
            _refuse_hidden(part)
    return operator.attrgetter(*names)


def _methodcaller(name: str, *arguments: Any, **named: Any) -> Callable[[Any], Any]:  # noqa: ANN401
    _refuse_hidden(name)
    return operator.methodcaller(name, *arguments, **named)


def _update_wrapper(
    wrapper: Any,  # noqa: ANN401
    wrapped: Any,  # noqa: ANN401
    assigned: Iterable[str] = functools.WRAPPER_ASSIGNMENTS,
    updated: Iterable[str] = functools.WRAPPER_UPDATES,
) -> Any:  # noqa: ANN401
    assigned, updated = _visible(assigned), _visible(updated)
    return functools.update_wrapper(wrapper, wrapped, assigned, updated)


def _wraps(
    wrapped: Any,  # noqa: ANN401
    assigned: Iterable[str] = functools.WRAPPER_ASSIGNMENTS,
    updated: Iterable[str] = functools.WRAPPER_UPDATES,
) -> Callable[[Any], Any]:
    return functools.partial(_update_wrapper, wrapped=wrapped, assigned=_visible(assigned), updated=_visible(updated))


def _visible(names: Iterable[str]) -> tuple[str, ...]:
    """The names as plain texts; those that the library itself copies are allowed, of others the gate's rules hold."""
    plain = tuple(_plain(name) for name in names)
    for name in plain:
        if name not in _COPIED:
            _refuse_hidden(name)
    return plain


_COPIED: Final = frozenset({*functools.WRAPPER_ASSIGNMENTS, *functools.WRAPPER_UPDATES})
_REPLACED: Final[dict[int, Callable[..., Any]]] = {
    id(operator.attrgetter): _attrgetter,
    id(operator.methodcaller): _methodcaller,
    id(functools.update_wrapper): _update_wrapper,
    id(functools.wraps): _wraps,
}
"""By identity: other modules hold the same functions."""


def _refuse_hidden(name: object) -> None:
    """Raises AttributeError if `name` is a text, however much it pretends to be another one, that names the hidden."""
    if issubclass(type(name), str) and is_hidden_attribute(_plain(name)):
        raise AttributeError(f"attribute {_plain(name)} is not allowed")


def _plain(name: object) -> str:
    return str.__str__(name)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
