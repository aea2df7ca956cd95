"""Runs one untrusted program on its inputs, inside the child that was forked for it.

Whatever this module says about the outcome is a claim: the program shares its process and can change anything here.
"""

import builtins
import marshal
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any, Final

from azr_async.adapters.sandbox.inside.gate import is_hidden_attribute
from azr_async.adapters.sandbox.inside.wire import ARGUMENTS
from azr_async.algorithm.values import TooLarge, Unanswerable, encode_in_order

Namespace = dict[str, Any]

MODULE_NAME: Final = "__program__"
_ABSENT: Final = "open input breakpoint exit quit help eval exec compile copyright credits license __loader__ __spec__"
ABSENT_BUILTINS: Final = frozenset(_ABSENT.split())


class Stage:
    """Where programs run, set up before the fork: every object that a child makes or touches costs it a page fault."""

    def __init__(self, names: Namespace, result_bytes: int) -> None:
        self._names = names
        self._result_bytes = result_bytes
        self._module = self._new_module()

    def claims(self, code: bytes, inputs: list[bytes]) -> Iterator[bytes]:
        """One claim for each input, a letter and its content of at most `result_bytes`.

        V  the value as JSON      E  why there is none      M  memory ran out      L  the value is too long
        """
        # Each input gets globals and builtins of its own; the only input of a child takes those that are there.
        modules = [self._module, *(self._new_module() for _ in inputs[1:])]
        for argument, module in zip(inputs, modules, strict=True):
            sys.modules[MODULE_NAME] = module  # dataclasses look their module up
            yield _claim(code, argument, vars(module), self._result_bytes)

    def _new_module(self) -> types.ModuleType:
        module = types.ModuleType(MODULE_NAME)
        vars(module)["__builtins__"] = dict(self._names)
        return module


def builtin_names(allowed_imports: Collection[str]) -> Namespace:
    """The builtins of a program: nothing that reaches files or the terminal, and only allowed imports."""
    real_import, real_getattr = builtins.__import__, builtins.getattr

    def guarded_import(name: str, *context: Any, **named: Any) -> types.ModuleType:  # noqa: ANN401
        if name not in allowed_imports:
            raise ImportError(f"import of {name} is not allowed")
        return real_import(name, *context, **named)

    def guarded_getattr(owner: object, name: str, *default: object) -> object:
        if type(name) is str and is_hidden_attribute(name):
            raise AttributeError(f"attribute {name} is not allowed")
        return real_getattr(owner, name, *default)

    names = {name: value for name, value in vars(builtins).items() if name not in ABSENT_BUILTINS}
    return names | {"__import__": guarded_import, "getattr": guarded_getattr}


def _claim(code: bytes, argument: bytes, namespace: Namespace, result_bytes: int) -> bytes:
    try:
        exec(marshal.loads(code), namespace)
        arguments, named = _arguments(argument, namespace)
        text = encode_in_order(namespace["f"](*arguments, **named))
    except MemoryError:
        return b"M"
    except TooLarge as error:
        return b"L" + str(error).encode()
    except Unanswerable as error:
        return b"E" + f"unanswerable: {error}".encode("utf-8", "backslashreplace")[:200]
    except BaseException as error:
        return b"E" + str(type(error).__name__).encode("utf-8", "backslashreplace")[:200]
    if len(text) > result_bytes:
        return b"L" + f"{len(text)} bytes, {result_bytes} are allowed".encode()
    return b"V" + text.encode()


def _arguments(argument: bytes, namespace: Namespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    content = marshal.loads(argument[1:])
    if argument[:1] == b"A":
        arguments, named = content
        return arguments, named
    values: tuple[tuple[Any, ...], dict[str, Any]] = eval(
        content, namespace | {ARGUMENTS: lambda *arguments, **named: (arguments, named)}
    )
    return values
