"""In which order a module's forward pass uses its children, read from its source: what runs before the layers, and after.

Registration says less: OPT registers its final norm before its layers, BART the embedding's norm after them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_DEEPEST = 3  # methods that forward calls, and those that these call


def run_order(kind: type[nn.Module]) -> list[str]:
    """Returns the attributes that a class's forward pass names, in the order of its lines; empty without source.

    A method of the class that is called stands for what it names itself.
    """
    return list(dict.fromkeys(_names(kind, "forward", _DEEPEST)))


def loops_of(kind: type[nn.Module]) -> list[set[str]]:
    """Returns, for each loop of a class's forward pass, the attributes it names."""
    tree = _source(kind, "forward")
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)] if tree else []
    return [set(_attributes(loop)) for loop in loops]


def _names(kind: type[nn.Module], method: str, depth: int) -> Iterator[str]:
    tree = _source(kind, method)
    for name in _attributes(tree) if tree else ():
        if depth and inspect.isfunction(inspect.getattr_static(kind, name, None)):
            yield from _names(kind, name, depth - 1)
        else:
            yield name


def _attributes(tree: ast.AST) -> Iterator[str]:
    """Yields the attributes of self as they are evaluated: `self.norm(self.layers(x))` runs layers first."""
    if isinstance(tree, ast.Call):
        for node in (*tree.args, *tree.keywords, tree.func):
            yield from _attributes(node)
    elif isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "self":
        yield tree.attr
    else:
        for node in ast.iter_child_nodes(tree):
            yield from _attributes(node)


def _source(kind: type[nn.Module], method: str) -> ast.AST | None:
    function = inspect.unwrap(getattr(kind, method))
    if function is nn.Module.forward:
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed into a session, compiled, or built at run time
        return None
