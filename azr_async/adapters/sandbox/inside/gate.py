"""Which programs are refused before they run. Policy and clean training data; the operating system is the wall."""

import ast
from collections.abc import Collection, Iterable, Sequence
from typing import Final

VARS: Final = "__vars__"
"""The builtin that stands for reading `__dict__` (`read_dicts_by_vars`)."""
HIDDEN_NAMES: Final = frozenset({"__import__", "__builtins__", "__loader__", "__spec__", "__build_class__", VARS})

_INTO_THE_INTERPRETER: Final = """
    tb_frame tb_next f_back f_builtins f_code f_globals f_locals f_trace co_code co_consts gi_frame gi_code gi_yieldfrom
    cr_await cr_frame cr_code cr_origin ag_frame ag_code ag_await
"""
"""Frames, code objects and generators lead from a program's own objects into the code that runs it."""
HIDDEN_ATTRIBUTES: Final = frozenset(_INTO_THE_INTERPRETER.split())

_SPECIAL_METHODS: Final = """
    init new name len eq lt le gt ge ne repr str bytes format hash iter next reversed doc post_init getitem setitem
    delitem contains missing call enter exit bool int float complex index round trunc floor ceil abs neg pos invert
    add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor radd rsub rmul rtruediv rfloordiv
    rmod rpow rand ror rxor rlshift rrshift iadd isub imul itruediv ifloordiv imod ipow iand ior ixor copy deepcopy
    slots annotations match_args set_name length_hint class qualname setattr delattr getattr init_subclass
    instancecheck subclasscheck class_getitem wrapped
"""
SPECIAL_METHODS: Final = frozenset(f"__{name}__" for name in _SPECIAL_METHODS.split())

_DIFFERENT_EVERYWHERE: Final = frozenset({"set", "frozenset", "hash", "id"})
_CHANCE: Final = frozenset({"time", "datetime", "calendar", "random", "weakref", "queue"})
"""Modules that hold a clock, dice, or an order of addresses."""
_OF_SETS: Final = (ast.BitAnd, ast.BitOr, ast.BitXor)
_MAYBE_DOUBTFUL: Final = frozenset(
    {ast.Set, ast.SetComp, ast.Name, ast.Attribute, ast.BinOp, ast.Import, ast.ImportFrom}
)


def refusal(nodes: Iterable[ast.AST], allowed_imports: Collection[str]) -> str | None:
    """Why a program of these nodes is refused, or None."""
    written_out: set[int] = set()
    for node in nodes:  # parents come first
        if (target := _written_out_target(node)) is not None:
            written_out.add(id(target))
        if id(node) not in written_out and _names_match_args(node):
            return "__match_args__ is allowed only as a tuple that is written out"
        reason = _refusal_of(node, allowed_imports)
        if reason is not None:
            return reason
    return None


def is_hidden_attribute(name: str) -> bool:
    """Whether a program may not reach the attribute `name`, however it spells it."""
    return name in HIDDEN_ATTRIBUTES or (name.startswith("__") and name.endswith("__") and name not in SPECIAL_METHODS)


def is_doubtful(nodes: Iterable[ast.AST]) -> bool:
    """Whether what comes out may hang on the order of a set, a hash, an address or a clock.

    Such a dependence is often one between two outcomes, which two runs find only every other time.
    """
    asked = [node for node in nodes if type(node) in _MAYBE_DOUBTFUL]
    if any(_makes_doubtful(node) for node in asked):
        return True
    # Views may be held in names before they are combined.
    has_view = any(isinstance(node, ast.Attribute) and node.attr in ("keys", "items") for node in asked)
    return has_view and any(isinstance(node, ast.BinOp) and isinstance(node.op, _OF_SETS) for node in asked)


def read_dicts_by_vars(nodes: Sequence[ast.AST]) -> None:
    """Have each reading of `x.__dict__` call `VARS` instead, which keeps hidden attributes back. Parents come first."""
    for node in reversed(nodes):
        for field, child in ast.iter_fields(node):
            if isinstance(child, list):
                child[:] = [_by_vars(item) for item in child]
            else:
                setattr(node, field, _by_vars(child))


def _by_vars(child: object) -> object:
    match child:
        case ast.Attribute(attr="__dict__", ctx=ast.Load(), value=owner):
            place = {"lineno": child.lineno, "col_offset": child.col_offset}
            return ast.Call(ast.Name(VARS, ast.Load(), **place), [owner], [], **place)
    return child


def _written_out_target(node: ast.AST) -> ast.expr | None:
    """The `__match_args__` to which this assigns names that can be read here; a pattern will look them up."""
    match node:
        case ast.Assign(targets=[target], value=ast.Tuple(elts=names)):
            pass
        case ast.AnnAssign(target=target, value=ast.Tuple(elts=names)):
            pass
        case _:
            return None
    is_readable = all(
        isinstance(name, ast.Constant) and isinstance(name.value, str) and not is_hidden_attribute(name.value)
        for name in names
    )
    return target if is_readable and isinstance(target, ast.Name) and target.id == "__match_args__" else None


def _names_match_args(node: ast.AST) -> bool:
    """Whether this gives the name `__match_args__` to something."""
    match node:
        case ast.Name(id="__match_args__", ctx=ast.Store()) | ast.Attribute(attr="__match_args__", ctx=ast.Store()):
            return True
        case ast.FunctionDef(name="__match_args__") | ast.ClassDef(name="__match_args__"):
            return True
        case ast.alias(name=name, asname=bound):
            return (bound or name) == "__match_args__"
        case ast.MatchAs(name="__match_args__") | ast.MatchStar(name="__match_args__"):
            return True
    return False


def _makes_doubtful(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _DIFFERENT_EVERYWHERE
        case ast.Set() | ast.SetComp() | ast.Attribute(attr="__hash__"):
            return True
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr() | ast.BitXor() | ast.Sub(), left=left, right=right):
            return _is_view(left) or _is_view(right)
        case ast.Import(names=names):
            return any(alias.name in _CHANCE for alias in names)
        case ast.ImportFrom(module=module):
            return module in _CHANCE
    return False


def _is_view(node: ast.expr) -> bool:
    """Whether this is `x.keys()` or `x.items()`, which make sets when they are combined."""
    match node:
        case ast.Call(func=ast.Attribute(attr="keys" | "items")):
            return True
    return False


def _refusal_of(node: ast.AST, allowed_imports: Collection[str]) -> str | None:
    match node:
        case ast.Attribute(attr=name) if is_hidden_attribute(name) and name != "__dict__":
            return f"attribute {name} is not allowed"
        case ast.Name(id=name) if name in HIDDEN_NAMES:
            return f"name {name} is not allowed"
        case ast.AnnAssign(target=ast.Name(id=name)) if is_hidden_attribute(name):  # a dataclass makes patterns of them
            return f"field {name} is not allowed"
        case ast.MatchClass(kwd_attrs=names):
            hidden = [name for name in names if is_hidden_attribute(name)]
            return f"attribute {hidden[0]} is not allowed" if hidden else None
        case ast.Import(names=aliases):
            modules = [alias.name for alias in aliases]
        case ast.ImportFrom(module=module, names=aliases, level=level):
            modules = ["." * level + (module or "")]
            for alias in aliases:
                if is_hidden_attribute(alias.name):
                    return f"import of {alias.name} is not allowed"
        case _:
            return None
    refused = [module for module in modules if module not in allowed_imports]
    return f"import of {refused[0][:100]} is not allowed" if refused else None
