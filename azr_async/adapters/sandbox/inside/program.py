"""Runs one untrusted program on its inputs, inside the child that was forked for it.

Whatever this module says about the outcome is a claim: the program shares its process and can change anything here.
"""

import errno
import marshal
import sys
import types
from collections.abc import Iterator
from typing import Any, Final

from azr_async.adapters.sandbox.inside.wire import ARGUMENTS
from azr_async.algorithm.values import TooLarge, Unanswerable, encode_in_order

Namespace = dict[str, Any]

MODULE_NAME: Final = "__program__"
ERROR_BYTES: Final = 200


class Stage:
    """Where programs run, set up before the fork: every object that a child makes or touches costs it a page fault."""

    def __init__(self, names: Namespace, result_bytes: int) -> None:
        self._names = names
        self._result_bytes = result_bytes
        self._module = self._new_module()

    def claims(self, code: bytes, inputs: list[bytes]) -> Iterator[bytes]:
        """One claim for each input, a letter and its content of at most `result_bytes`.

        V  the value as JSON      E  why there is none      M  memory ran out      L  the value is too long
        F  why there is none: the kernel refused a file
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


def _claim(code: bytes, argument: bytes, namespace: Namespace, result_bytes: int) -> bytes:
    try:
        exec(marshal.loads(code[1:]), namespace)
        arguments, named = _arguments(argument, namespace)
        text = encode_in_order(namespace["f"](*arguments, **named))
    except MemoryError:
        return b"M"
    except TooLarge as error:
        return b"L" + str(error).encode()
    except Unanswerable as error:
        return b"E" + f"unanswerable: {error}".encode("utf-8", "backslashreplace")[:ERROR_BYTES]
    except BaseException as error:
        return (b"F" if _is_about_files(error) else b"E") + _in_a_line(error)
    if len(text) > result_bytes:
        return b"L" + f"{len(text)} bytes, {result_bytes} are allowed".encode()
    return b"V" + text.encode()


def _is_about_files(error: BaseException) -> bool:
    """Whether the kernel refused a file: to open it, or to make it larger than nothing."""
    if type(error) is PermissionError:
        return error.filename is not None
    return type(error) is OSError and error.errno == errno.EFBIG


def _in_a_line(error: BaseException) -> bytes:
    """The error's name and the first line of what it says, as the traceback would end."""
    name = str(type(error).__name__)
    try:
        text = str(error).partition("\n")[0]
    except BaseException:  # the program's own class may do anything
        text = ""
    return (f"{name[:80]}: {text}" if text else name).encode("utf-8", "backslashreplace")[:ERROR_BYTES]


def _arguments(argument: bytes, namespace: Namespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    content = marshal.loads(argument[2:])
    if argument[:1] == b"A":
        arguments, named = content
        return arguments, named
    values: tuple[tuple[Any, ...], dict[str, Any]] = eval(
        content, namespace | {ARGUMENTS: lambda *arguments, **named: (arguments, named)}
    )
    return values
