"""The starter's little world: programs of one or two statements over short lists, short texts and small numbers.

Every operation carries what it does beside how it is written, so programs of the grammar are run by table look-up:
nothing here compiles or evaluates text. That makes this module a judge for the warm start only; self-play itself
judges in the sandbox, where any Python may come.
"""

import ast
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import add
from random import Random
from typing import Any, Final, Literal

Kind = Literal["list", "text", "number"]

_HELD_OUT_ONE_IN: Final = 8
_INPUT_CHARACTERS_MOST: Final = 60
_OUTPUT_CHARACTERS_MOST: Final = 60
_CONSTANT_MOST: Final = 9999
_KIND_WEIGHTS: Final[dict[Kind, float]] = {"list": 0.5, "text": 0.3, "number": 0.2}
_SECOND_STATEMENT_SHARE: Final = 0.5
_KIND_KEPT_SHARE: Final = 0.85
_KIND_KEPT_SHARE_AT_RETURN: Final = 0.6


@dataclass(frozen=True, slots=True)
class Operation:
    """One expression in `x`; each {} of the template is one drawn constant, which `apply` receives as a value."""

    template: str
    word: str
    """What a message calls it."""
    takes: Kind
    gives: Kind
    apply: Callable[..., Any]
    constants: tuple[str, ...] = ()
    """What may stand for {}, as source text."""


@dataclass(frozen=True, slots=True)
class GrammarProgram:
    """A drawn program. Without sloppiness every input of kind `takes` suits its first statement."""

    source: str
    takes: Kind
    words: tuple[str, ...]
    """One per statement: the message that names its operations."""

    @property
    def message(self) -> str:
        """The words as one text."""
        return " ".join(self.words)


def random_program(random: Random, *, statements: int | None = None, sloppiness: float = 0.0) -> GrammarProgram:
    """Draw a program of one or two statements.

    Args:
        random: the only source of chance.
        statements: 1 or 2; drawn when None.
        sloppiness: probability, per statement, of an operation for some other kind of value - often a runtime error.
    """
    if statements is None:
        statements = 2 if random.random() < _SECOND_STATEMENT_SHARE else 1
    takes = kind = random.choices(list(_KIND_WEIGHTS), list(_KIND_WEIGHTS.values()))[0]
    lines, words = ["def f(x):"], []
    for number in range(statements):
        is_return = number == statements - 1
        if random.random() < sloppiness:
            kind = random.choice(list(_KIND_WEIGHTS))
        kept_share = _KIND_KEPT_SHARE_AT_RETURN if is_return else _KIND_KEPT_SHARE
        operation = _random_operation(random, kind, keeps_kind=random.random() < kept_share)
        expression = operation.template
        if operation.constants:
            expression = expression.format(random.choice(operation.constants))
        lines.append(f"    return {expression}" if is_return else f"    x = {expression}")
        words.append(operation.word)
        kind = operation.gives
    return GrammarProgram("\n".join(lines), takes, tuple(words))


def random_input(random: Random, kind: Kind) -> str:
    """Draw an input of a kind, as a Python literal."""
    if kind == "list":
        return repr([random.randint(0, 9) for _ in range(random.randint(1, 3))])
    if kind == "text":
        return repr("".join(random.choice("abcd") for _ in range(random.randint(1, 3))))
    return repr(random.randint(0, 20))


def random_kind(random: Random) -> Kind:
    """Draw a kind of value, each as likely."""
    return random.choice(list(_KIND_WEIGHTS))


def is_held_out(program: str) -> bool:
    """Does this program belong to the evaluation? About one in eight with several statements does, by its hash.

    One-statement programs never do: they are the language's words, and what is evaluated is what is said with them.
    """
    lines = program.strip().split("\n")
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=1).digest()
    return len(lines) > 2 and digest[0] % _HELD_OUT_ONE_IN == 0


def run(program: str, argument: str) -> str | None:
    """What a program made of the grammar's operations returns, as a literal.

    None when the program is not of that make, the argument is not one literal, or running it fails.
    """
    expressions = _expressions(program)
    value = read_value(argument)
    if expressions is None or value is None:
        return None
    try:
        for apply, constants in expressions:
            value = apply(value, *constants)
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError, MemoryError):
        return None
    is_answerable = isinstance(value, int | str | list)
    text = repr(value) if is_answerable else ""
    return text if is_answerable and len(text) <= _OUTPUT_CHARACTERS_MOST else None


def is_runnable(program: str) -> bool:
    """Is the program made of the grammar's operations? (Whether they suit its input is another matter.)"""
    return _expressions(program) is not None


def read_value(literal: str) -> object | None:
    """The value of a short Python literal, None when it is anything else. Nothing is evaluated."""
    if len(literal) > _INPUT_CHARACTERS_MOST:
        return None
    try:
        value = ast.literal_eval(literal.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, int | str | list) else None


def _random_operation(random: Random, kind: Kind, *, keeps_kind: bool) -> Operation:
    others = [gives for gives in _KIND_WEIGHTS if gives != kind and _OPERATIONS_FROM_TO.get((kind, gives))]
    gives = kind if keeps_kind else random.choice(others)
    return random.choice(_OPERATIONS_FROM_TO[kind, gives])


_CONSTANT = re.compile(r"'[^'\\]*'|\d+")
_STATEMENT = re.compile(r"    (x = |return )(.+)")


def _expressions(program: str) -> list[tuple[Callable[..., Any], list[Any]]] | None:
    """Each statement's function and constants, None when a line is not of the grammar's make."""
    head, *body = program.rstrip("\n").split("\n")
    if head != "def f(x):" or not body:
        return None
    found = []
    for number, line in enumerate(body):
        matched = _STATEMENT.fullmatch(line)
        if matched is None or (matched[1] == "return ") != (number == len(body) - 1):
            return None
        apply = _APPLY_BY_TEMPLATE.get(_CONSTANT.sub("{}", matched[2]))
        constants = [read_value(constant) for constant in _CONSTANT.findall(matched[2])]
        if apply is None or any(c is None or (isinstance(c, int) and c > _CONSTANT_MOST) for c in constants):
            return None
        found.append((apply, constants))
    return found


def _digits(first: int, last: int) -> tuple[str, ...]:
    return tuple(map(str, range(first, last + 1)))


_LETTERS = ("'a'", "'b'", "'c'", "'d'")
# The same template means the same in Python whatever x is, so one function per template serves every kind.
OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation("x[::-{}]", "reverse", "list", "list", lambda x, n: x[::-n], ("1",)),
    Operation("x[{}:]", "slice", "list", "list", lambda x, n: x[n:], ("1",)),
    Operation("x[:{}]", "slice", "list", "list", lambda x, n: x[:n], ("2",)),
    Operation("x[:-{}]", "slice", "list", "list", lambda x, n: x[:-n], ("1",)),
    Operation("x + [{}]", "append", "list", "list", lambda x, n: add(x, [n]), _digits(0, 9)),
    Operation("[{}] + x", "append", "list", "list", lambda x, n: add([n], x), _digits(0, 9)),
    Operation("sorted(x)", "sort", "list", "list", sorted),
    Operation("[a + {} for a in x]", "map", "list", "list", lambda x, n: [a + n for a in x], _digits(1, 3)),
    Operation(
        "[a for a in x if a > {}]", "filter", "list", "list", lambda x, n: [i for i in x if i > n], _digits(2, 6)
    ),
    Operation("x + x", "repeat", "list", "list", lambda x: x + x),
    Operation("len(x)", "length", "list", "number", len),
    Operation("sum(x)", "total", "list", "number", sum),
    Operation("max(x)", "index", "list", "number", max),
    Operation("x[{}]", "index", "list", "number", lambda x, n: x[n], ("0",)),
    Operation("x[-{}]", "index", "list", "number", lambda x, n: x[-n], ("1",)),
    Operation("x + {}", "arithmetic", "number", "number", lambda x, n: x + n, _digits(1, 9)),
    Operation("x - {}", "arithmetic", "number", "number", lambda x, n: x - n, _digits(1, 5)),
    Operation("x * {}", "arithmetic", "number", "number", lambda x, n: x * n, ("2",)),
    Operation("[x, {}]", "pair", "number", "list", lambda x, n: [x, n], _digits(0, 9)),
    Operation("[x, x]", "pair", "number", "list", lambda x: [x, x]),
    Operation("x[::-{}]", "reverse", "text", "text", lambda x, n: x[::-n], ("1",)),
    Operation("x + {}", "append", "text", "text", lambda x, c: x + c, _LETTERS),
    Operation("{} + x", "append", "text", "text", lambda x, c: c + x, _LETTERS),
    Operation("x.upper()", "upper", "text", "text", lambda x: x.upper()),
    Operation("x[{}:]", "slice", "text", "text", lambda x, n: x[n:], ("1",)),
    Operation("x[:{}]", "slice", "text", "text", lambda x, n: x[:n], ("2",)),
    Operation("x[:-{}]", "slice", "text", "text", lambda x, n: x[:-n], ("1",)),
    Operation("x + x", "repeat", "text", "text", lambda x: x + x),
    Operation("len(x)", "length", "text", "number", len),
)
_APPLY_BY_TEMPLATE: Final = {operation.template: operation.apply for operation in OPERATIONS}
_OPERATIONS_FROM_TO: Final[dict[tuple[Kind, Kind], list[Operation]]] = {
    (takes, gives): [operation for operation in OPERATIONS if (operation.takes, operation.gives) == (takes, gives)]
    for takes in _KIND_WEIGHTS
    for gives in _KIND_WEIGHTS
}
