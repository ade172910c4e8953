"""What stands outside a model's stacks: what embeds, what makes the outputs, and which layer the rest stands beside.

The embedding is what `get_input_embeddings()` returns, tables, and what runs before the first layer; the head is what
`get_output_embeddings()` returns and what runs after the last. A norm right after a stack belongs to its last layer, and
so does a projection from one stack to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from hessprobe.problem.forward_order import run_order
from hessprobe.problem.layer_names import kind_by_name
from hessprobe.problem.stacks import Stack, Stacks, children_of, components

_EMBEDDING_PARTS = ("token", "pos", "mask", "cls", "query", "queries", "latent", "patch")
_SCALES = ("scale", "bias", "temperature")


class Roles:
    """The role of every parameter outside the stacks: `embedding`, `head`, a layer's name, or None where nothing tells.

    Args:
        model: the whole model.
        stacks: its stacks.
    """

    def __init__(self, model: nn.Module, stacks: Stacks) -> None:
        self.model = model
        self.stacks = stacks
        self.inputs = _parameters_of(model, "get_input_embeddings", stacks)
        self.outputs = _parameters_of(model, "get_output_embeddings", stacks)
        self._orders: dict[str, dict[str, int]] = {}

    def of(self, name: str, parameter: Tensor) -> str | None:
        """Returns the role of a parameter under one of its names."""
        if id(parameter) in self.outputs and not self._embeds(name):
            return "head"
        by_name = kind_by_name(name)
        if id(parameter) in self.inputs or self._embeds(name) or by_name == "embedding":
            return "embedding"
        if any(_inside(name, path) for path in self.stacks.embedding):
            return "embedding"
        if not self.stacks.stacks:
            return "head" if by_name == "final_norm" else by_name
        return self._beside(name, parameter, by_name)

    def _embeds(self, name: str) -> bool:
        """Tells whether a parameter lies in a table, or in something called or classed an embedding."""
        path, _, _ = name.rpartition(".")
        at: nn.Module = self.model
        for part in path.split(".") if path else ():
            at = at.get_submodule(part)
            kind = type(at).__name__.lower()
            if isinstance(at, nn.Embedding) or kind.endswith(("embedding", "embeddings", "embedder")):
                return True
        return any("embed" in p and not p.startswith(("un", "out", "embed_out")) for p in components(name))

    def _beside(self, name: str, parameter: Tensor, by_name: str | None) -> str | None:
        """Returns the role that a place before, between or after the stacks gives."""
        place = self._place(name)
        before, after = self._around(*place)
        scope = self._scope(place[0])
        everywhere = len(scope) == len(self.stacks.stacks)
        if by_name == "final_norm":
            return (before or scope)[-1].last
        if by_name == "head" and everywhere:
            return "head"
        at, branch = place
        module = self._module(at)._modules.get(branch)
        if module is None:  # a bare parameter
            return self._bare(branch, before, after, everywhere)
        heavy = any(p.dim() > 1 for p in module.parameters())
        if not before and after:
            return "embedding" if heavy or _is_norm(branch, module) else None
        if not before:
            return None
        if _is_norm(branch, module) and not self._follows_heavy(at, branch, before[-1]):
            return before[-1].last
        if any(id(p) in self.outputs for p in module.parameters()):
            return "head"
        if after or not everywhere:
            return before[-1].last
        return "head" if heavy or self._follows_heavy(at, branch, before[-1]) else None

    def _bare(self, name: str, before: list[Stack], after: list[Stack], everywhere: bool) -> str | None:
        parts = name.lower().split("_")
        if any(part.startswith(_EMBEDDING_PARTS) for part in parts):
            return "embedding"
        if before and not after:
            return "head" if everywhere else before[-1].last
        if after and not before:
            return "embedding"
        if everywhere and any(part in _SCALES for part in parts):
            return "head"
        return before[-1].last if before else None

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path) if path else self.model

    def _place(self, name: str) -> tuple[str, str]:
        """Returns the innermost module around a parameter that holds a stack, and its child that holds the parameter."""
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            path = ".".join(parts[:end])
            if self._scope(path):
                return path, parts[end]
        raise AssertionError("the root holds every stack")

    def _scope(self, path: str) -> list[Stack]:
        return [stack for stack in self.stacks.stacks if _inside(stack.lists[0], path)]

    def _around(self, path: str, branch: str) -> tuple[list[Stack], list[Stack]]:
        """Returns the stacks that run before and after a child; neither holds one whose order nothing tells."""
        before, after = [], []
        for stack in self._ordered_scope(path):
            placed = self._earlier(path, branch, _branch(path, stack))
            if placed is not None:
                (after if placed else before).append(stack)
        return before, after

    def _ordered_scope(self, path: str) -> list[Stack]:
        order = self._order(path)
        return sorted(self._scope(path), key=lambda stack: order.get(_branch(path, stack), 0))

    def _earlier(self, path: str, one: str, other: str) -> bool | None:
        """Tells whether one child of a module runs before another: by its forward pass, else as they are registered."""
        order = self._order(path)
        if one in order and other in order:
            return order[one] < order[other]
        registered = list(self._module(path)._modules)
        if one in registered and other in registered:
            return registered.index(one) < registered.index(other)
        return None

    def _order(self, path: str) -> dict[str, int]:
        if path not in self._orders:
            module = self._module(path)
            names = () if isinstance(module, nn.Sequential) else run_order(type(module))
            self._orders[path] = {name: i for i, name in enumerate(names)}
        return self._orders[path]

    def _follows_heavy(self, path: str, branch: str, stack: Stack) -> bool:
        """Tells whether something with a matrix runs between a stack and a child: the child then belongs to that."""
        own = _branch(path, stack)
        for other, module in children_of(self._module(path)).items():
            name = f"{path}.{other}.x" if path else f"{other}.x"
            skipped = other in (branch, own) or _is_norm(other, module)
            if skipped or self._embeds(name) or self.stacks.layer(name):
                continue
            heavy = any(p.dim() > 1 for p in module.parameters())
            if heavy and self._earlier(path, own, other) and self._earlier(path, other, branch):
                return True
        return False


def _inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _branch(path: str, stack: Stack) -> str:
    """Returns the child of a module through which it holds a stack; the list's first layer where it is the list."""
    inner = stack.lists[0].removeprefix(path).removeprefix(".")
    return (inner or next(iter(stack.numbers)).removeprefix(path).removeprefix(".")).split(".")[0]


def _is_norm(name: str, module: nn.Module) -> bool:
    """Tells whether a module is a norm, by its class or by its name and vectors, or holds nothing but norms."""
    if any(p.dim() > 1 for p in module.parameters()):
        return False
    leaves = [m for m in module.modules() if m._parameters]
    return "norm" in name or name.startswith("ln") or all("norm" in type(m).__name__.lower() for m in leaves)


def _parameters_of(model: nn.Module, method: str, stacks: Stacks) -> set[int]:
    """Returns the ids of the parameters of what a method of the model or of a module in it returns."""
    return {id(p) for module in _returned(model, method) if not _holds_stack(model, module, stacks.stacks)
            for p in module.parameters()}  # fmt: skip


def _returned(model: nn.Module, method: str) -> Iterator[nn.Module]:
    for module in model.modules():
        asked = getattr(module, method, None)
        if callable(asked):
            try:
                found = asked()
            except Exception:  # the model's own code: transformers' vision models raise where they have none
                continue
            if isinstance(found, nn.Module):
                yield found


def _holds_stack(model: nn.Module, module: nn.Module, stacks: tuple[Stack, ...]) -> bool:
    inside = {id(m) for m in module.modules()}
    return any(id(model.get_submodule(path)) in inside for stack in stacks for path in stack.lists)


def layer_of_names(
    aliases: Mapping[str, list[str]], parameters: Mapping[str, Tensor], model: nn.Module, stacks: Stacks
) -> tuple[dict[str, str | None], bool]:
    """Returns each parameter's layer (None: not recognised), and whether embedding and head share a tensor.

    Args:
        aliases: every name of each parameter, by its first one.
        parameters: the tensors by first name.
        model: the model.
        stacks: its stacks.
    """
    roles = Roles(model, stacks)
    found: dict[str, str | None] = {}
    tied = False
    for name, names in aliases.items():
        kinds: list[str | None] = []
        for alias in names or [name]:
            placed = stacks.layer(alias)
            kinds.append(placed[0].block(placed[1]) if placed else roles.of(alias, parameters[name]))
        tied |= {"embedding", "head"} <= set(kinds)
        outer = [kind for kind in kinds if kind in ("embedding", "head")]
        found[name] = next(iter(outer or [kind for kind in kinds if kind]), None)
    return found, tied
