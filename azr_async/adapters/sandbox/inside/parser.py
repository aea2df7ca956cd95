"""The parser service: untrusted text -> compiled code and literal arguments. It never runs what it compiles.

A frame holds requests as JSON, each `[mode, program, inputs]`. It is answered by one frame with one part for each
request, which has itself one part for the program (unless it is null) and one for each input: a letter and its content.

    C  marshalled code of the program              A  marshalled (args, kwargs) of a literal argument list
    X  marshalled code that computes (args, kwargs)   V  a literal's value as JSON (algorithm/values.py)
    E  why the text is refused                     S  why the program is no program
    U  why the text could not be read this time

The content of C, A and X begins with `SURE` or `DOUBTFUL` (gate.py).
"""

import ast
import json
import marshal
import sys
import unicodedata  # noqa: F401 - the compiler asks for it where a name is not ASCII, and could not open it later
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Final

from azr_async.adapters.sandbox.inside import layers
from azr_async.adapters.sandbox.inside.bombs import PART_BYTES, is_too_much
from azr_async.adapters.sandbox.inside.gate import is_doubtful, read_dicts_by_vars, refusal
from azr_async.adapters.sandbox.inside.literals import NotLiteral, literal_value
from azr_async.adapters.sandbox.inside.wire import ARGUMENTS, DOUBTFUL, SURE, read_frame, with_length, write_frame
from azr_async.algorithm.values import TooLarge, Unanswerable, encode_in_order

_SYNTAX_ERRORS: Final = (SyntaxError, ValueError, TypeError, RecursionError, UnicodeError)


Allowed = Collection[str] | None
"""Modules that a program may import; None if it may do everything."""
Reader = Callable[[str, Allowed], bytes]


def prepare(options: layers.Options) -> tuple[layers.Report, Callable[[], None]]:
    """Confine this process; the layers that hold it, and the function that serves until the pool closes its end."""
    sys.setrecursionlimit(2000)
    # The first compilation builds the interpreter's syntax-tree types: before the walls go up.
    _program_part("import math\nclass A:\n    def f(self): return [x for x in (1,)]\ndef f(x): return x\n", {"math"})
    report = layers.confine(options, filter_name="CHILD")
    return report, partial(_serve, frozenset(options["allowed_imports"]) if options["is_gated"] else None)


def _serve(allowed_imports: Allowed) -> None:
    while (request := read_frame(layers.REQUEST_FD)) is not None:
        answers = (_answer(*each, allowed_imports=allowed_imports) for each in json.loads(request))
        write_frame(layers.RESULT_FD, b"".join(map(with_length, answers)))


def _answer(mode: str, program: str | None, inputs: list[str], *, allowed_imports: Allowed) -> bytes:
    parts = [] if program is None else [_part(_program_part, program, allowed_imports)]
    parts += [_part(_READERS[mode], text, allowed_imports) for text in inputs]
    return b"".join(map(with_length, parts))


def _part(read: Reader, text: str, allowed_imports: Allowed) -> bytes:
    try:
        part = read(text, allowed_imports)
    except MemoryError:
        return b"Uit is nested too deeply, or takes more memory than there is"
    except Exception as error:  # whatever a text does to the reader, the next one is to be read
        return f"Uthe reader failed: {type(error).__name__}".encode()
    if len(part) > PART_BYTES:
        return _refused(f"it becomes larger than {PART_BYTES} bytes")
    return part


def _refused(reason: str) -> bytes:
    return b"E" + reason[:200].encode("utf-8", "backslashreplace")


def _program_part(program: str, allowed_imports: Allowed) -> bytes:
    try:
        tree = ast.parse(program, "<text>")
        nodes = list(ast.walk(tree))
        reason = None if allowed_imports is None else refusal(nodes, allowed_imports)
        if reason is not None:
            return _refused(reason)
        if not any(map(_binds_f, nodes)):
            return b"Sthe program does not define f"
        if is_too_much(program, tree, nodes):
            return _refused("too many statements, or ways through its finally blocks")
        if "__dict__" in program and allowed_imports is not None:
            read_dicts_by_vars(nodes)
        return b"C" + _doubt(nodes) + marshal.dumps(compile(tree, "<program>", "exec", dont_inherit=True))
    except _SYNTAX_ERRORS as error:
        return b"S" + f"the program is not Python: {type(error).__name__}".encode()


def _doubt(nodes: Iterable[ast.AST]) -> bytes:
    return DOUBTFUL if is_doubtful(nodes) else SURE


def _binds_f(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef(name="f") | ast.ClassDef(name="f") | ast.Name(id="f", ctx=ast.Store()):
            return True
        case ast.alias(name=name, asname=bound):
            return (bound or name) == "f"
    return False


def _read_arguments(text: str, allowed_imports: Allowed) -> bytes:
    """An argument list of literals, as it would stand between the parentheses of a call."""
    try:
        call = _parse_call(text)
        arguments = tuple(literal_value(argument) for argument in call.args)
        named = {keyword.arg: literal_value(keyword.value) for keyword in call.keywords}
        # Walking a tree takes longer than to make it, and most inputs hold nothing like a set.
        doubt = _doubt(ast.walk(call)) if "{" in text or "set" in text else SURE
        return b"A" + doubt + marshal.dumps((arguments, named))
    except NotLiteral as error:
        return _refused(f"the input is not a literal: {error}")
    except _SYNTAX_ERRORS as error:
        return _refused(f"the input is not an argument list: {type(error).__name__}")


def _read_expression(text: str, allowed_imports: Allowed) -> bytes:
    """An argument list of any expressions, to be evaluated beside the program."""
    try:
        call = _parse_call(text)
        nodes = list(ast.walk(call))
        reason = None if allowed_imports is None else refusal(nodes, allowed_imports)
        if reason is not None:
            return _refused(f"the input is refused: {reason}")
        if "__dict__" in text and allowed_imports is not None:
            read_dicts_by_vars(nodes)
        return b"X" + _doubt(nodes) + marshal.dumps(compile(ast.Expression(call), "<input>", "eval", dont_inherit=True))
    except _SYNTAX_ERRORS as error:
        return _refused(f"the input is not an argument list: {type(error).__name__}")


def _parse_call(text: str) -> ast.Call:
    """`text` between the parentheses of one call. An input that closes the call itself is no argument list."""
    tree = ast.parse(f"{ARGUMENTS}({text}\n)", "<input>", mode="eval").body
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.func.id != ARGUMENTS:
        raise SyntaxError("more than an argument list")
    names = [keyword.arg for keyword in tree.keywords]
    if None in names:
        raise NotLiteral("** is not a literal")
    if len(set(names)) != len(names):
        raise SyntaxError("an argument is named twice")
    return tree


def _read_value(text: str, allowed_imports: Allowed) -> bytes:
    """One literal."""
    try:
        value = literal_value(ast.parse(text.strip(), "<literal>", mode="eval").body)
        return b"V" + encode_in_order(value).encode()
    except NotLiteral as error:
        return _refused(f"not a literal: {error}")
    except (Unanswerable, TooLarge) as error:
        return _refused(f"not a literal that a program can return: {error}")
    except _SYNTAX_ERRORS as error:
        return _refused(f"not a literal: {type(error).__name__}")


_READERS: Final[dict[str, Reader]] = {
    "literal": _read_arguments,
    "expression": _read_expression,
    "value": _read_value,
}
