"""How much work a program is for the compiler: a few lines can be written so that it never ends."""

import ast
from collections.abc import Sequence
from typing import Final

COMPILED_NODES: Final = 50_000
"""Syntax nodes that a program may have when all is written out; a page of ordinary code has about 500."""
PART_BYTES: Final = 1 << 18
"""Of compiled code, or of the arguments of one call."""

_NODES_FOR_A_SCOPE: Final = 30
"""A code object takes about as long as so many nodes in one."""
_JUMPS: Final = (ast.Return, ast.Break, ast.Continue)
_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_SCOPES: Final = (*_FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_too_much(program: str, tree: ast.Module, nodes: Sequence[ast.AST]) -> bool:
    """Whether the compiler should not even begin; `nodes` are those of the program's tree."""
    if len(nodes) * (1 + _NODES_FOR_A_SCOPE) > COMPILED_NODES:  # else there is room for any number of scopes
        scopes = sum(isinstance(node, _SCOPES) for node in nodes)
        if len(nodes) + _NODES_FOR_A_SCOPE * scopes > COMPILED_NODES:
            return True
    return "finally" in program and _nodes_and_jumps(tree)[0] > COMPILED_NODES


def _nodes_and_jumps(node: ast.AST) -> tuple[int, int]:
    """At most so many nodes are compiled, with so many jumps: each way out of a `try` has its own copy of `finally`."""
    if not isinstance(node, ast.Try | ast.TryStar):
        nodes, jumps = _sum(list(ast.iter_child_nodes(node)))
        return nodes + 1, 0 if isinstance(node, _FUNCTIONS) else jumps + isinstance(node, _JUMPS)
    nodes, jumps = _sum([*node.body, *node.handlers, *node.orelse])
    final_nodes, final_jumps = _sum(list(node.finalbody))
    copies = jumps + 2
    return nodes + copies * final_nodes + 1, jumps + copies * final_jumps


def _sum(nodes: list[ast.AST]) -> tuple[int, int]:
    counts = [_nodes_and_jumps(node) for node in nodes]
    return sum(count for count, _ in counts), sum(jumps for _, jumps in counts)
