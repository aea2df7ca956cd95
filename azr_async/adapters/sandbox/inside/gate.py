"""Which programs are refused before they run. Policy and clean training data; the operating system is the wall."""

import ast
from collections.abc import Collection
from typing import Final

HIDDEN_NAMES: Final = frozenset({"__import__", "__builtins__", "__loader__", "__spec__", "__build_class__"})

_INTO_THE_INTERPRETER: Final = """
    tb_frame tb_next f_back f_builtins f_code f_globals f_locals f_trace co_code co_consts gi_frame gi_code gi_yieldfrom
    cr_await cr_frame cr_code cr_origin ag_frame ag_code ag_await
"""
"""Frames, code objects and generators lead from a program's own objects into the code that runs it."""
_HELD_MODULES: Final = "sys _sys os _os builtins _builtins importlib codecs _thread _imp"
"""Modules that nobody may import, but that allowed modules happen to hold."""
HIDDEN_ATTRIBUTES: Final = frozenset(f"{_INTO_THE_INTERPRETER} {_HELD_MODULES}".split())

_SPECIAL_METHODS: Final = """
    init new name len eq lt le gt ge ne repr str bytes format hash iter next reversed doc post_init getitem setitem
    delitem contains missing call enter exit bool int float complex index round trunc floor ceil abs neg pos invert
    add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor radd rsub rmul rtruediv rfloordiv
    rmod rpow rand ror rxor rlshift rrshift iadd isub imul itruediv ifloordiv imod ipow iand ior ixor copy deepcopy
    slots annotations match_args set_name length_hint
"""
SPECIAL_METHODS: Final = frozenset(f"__{name}__" for name in _SPECIAL_METHODS.split())


def refusal(tree: ast.AST, allowed_imports: Collection[str]) -> str | None:
    """Why the program is refused, or None."""
    for node in ast.walk(tree):
        reason = _refusal_of(node, allowed_imports)
        if reason is not None:
            return reason
    return None


def is_hidden_attribute(name: str) -> bool:
    """Whether a program may not reach the attribute `name`, however it spells it."""
    return name in HIDDEN_ATTRIBUTES or (name.startswith("__") and name.endswith("__") and name not in SPECIAL_METHODS)


def _refusal_of(node: ast.AST, allowed_imports: Collection[str]) -> str | None:
    match node:
        case ast.Attribute(attr=name) if is_hidden_attribute(name):
            return f"attribute {name} is not allowed"
        case ast.Name(id=name) if name in HIDDEN_NAMES:
            return f"name {name} is not allowed"
        case ast.Import(names=names):
            modules = [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            modules = ["." * level + (module or "")]
            for alias in names:
                if is_hidden_attribute(alias.name):
                    return f"import of {alias.name} is not allowed"
        case _:
            return None
    refused = [module for module in modules if module not in allowed_imports]
    return f"import of {refused[0][:100]} is not allowed" if refused else None
