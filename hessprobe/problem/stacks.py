"""A model's stacks: its outermost lists of repeated layers, each with a prefix that tells it from the others.

A list is found by what it holds (equal classes that hold modules themselves), not by what it is called. Lists that one
loop of a forward pass runs side by side (XLM's attentions and feed-forwards) are one stack; the convolutions before a
transformer's layers (audio models' feature extractors) are none, they embed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from hessprobe.problem.forward_order import loops_of

# What compile, DDP and checkpointing put into names.
WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# Names that make a list of layers one even where nothing in it repeats: a hybrid's two layers, a list of matrices.
REPEATED = {"h", "blocks", "block", "layers", "layer"}
# What a tower's name says beside which tower it is: vision_model, language_model, image_encoder.
_SUFFIXES = ("_model", "_tower", "_encoder", "_transformer", "_layers", "_blocks")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Repeated layers: the full path of each layer's modules, with the layer's number.

    `lists` are the lists' own paths, several where one loop runs them side by side; `prefix` is empty or ends in a dot.
    """

    lists: tuple[str, ...]
    numbers: Mapping[str, int]
    prefix: str = ""

    def block(self, number: int) -> str:
        """Returns a layer's name: `block.3`, or `vision.block.3` where there are several stacks."""
        return f"{self.prefix}block.{number}"

    @property
    def last(self) -> str:
        """The last layer's name."""
        return self.block(max(self.numbers.values()))


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """All stacks of a model in the order of its modules, and the paths of lists that belong to the embedding."""

    stacks: tuple[Stack, ...]
    embedding: tuple[str, ...] = ()
    _layers: dict[str, tuple[Stack, int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for stack in self.stacks:
            self._layers.update({path: (stack, number) for path, number in stack.numbers.items()})

    def layer(self, name: str) -> tuple[Stack, int, str] | None:
        """Returns the stack, the number and the rest of the name of a layer's parameter; None outside the stacks."""
        parts = name.split(".")
        for end in range(len(parts)):
            found = self._layers.get(".".join(parts[:end]))
            if found:
                stack, number = found
                rest = parts[end:]
                if len(stack.lists) > 1:
                    rest = [parts[end - 2], *rest]
                return stack, number, ".".join(rest)
        return None


def components(name: str) -> list[str]:
    """Splits a dotted name, leaving out what compile, DDP and checkpoint wrappers add."""
    return [part for part in name.split(".") if part not in WRAPPERS]


def holds_parameters(module: nn.Module) -> bool:
    """Tells whether a module or one inside it has parameters."""
    return next(module.parameters(), None) is not None


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the children that hold parameters, a shared one under each of its names."""
    return {n: child for n, child in module._modules.items() if child is not None and holds_parameters(child)}


def stacks_of(model: nn.Module) -> Stacks:
    """Returns a model's stacks; none where nothing repeats (a plain MLP, a single LSTM)."""
    lists = dict(_lists(model, "", composite=True)) or dict(_lists(model, "", composite=False))
    convolutional = {path for path, elements in lists.items() if _convolutional(model, elements)}
    embedding = tuple(
        path
        for i, path in enumerate(lists)
        if any("embed" in part or "feature_extract" in part for part in path.split("."))
        or (path in convolutional and any(later not in convolutional for later in list(lists)[i + 1 :]))
    )
    kept = {path: elements for path, elements in lists.items() if path not in embedding}
    if not kept:  # nothing but feature extractors: they are the layers
        kept, embedding = lists, ()
    merged = [_with_companions(model, group, kept) for group in _side_by_side(model, kept)]
    prefixes = _prefixes([stack.lists[0] for stack in merged])
    named = [replace(stack, prefix=prefix) for stack, prefix in zip(merged, prefixes, strict=True)]
    return Stacks(stacks=tuple(named), embedding=embedding)


def _lists(module: nn.Module, path: str, *, composite: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the outermost lists of layers: path -> {layer's path: its number}."""
    children = children_of(module)
    elements = (_composite_layers if composite else _leaf_layers)(module, path, children)
    dot = f"{path}." if path else ""
    if elements:
        yield path, {f"{dot}{name}": number for name, number in elements.items()}
        return
    for name, child in children.items():
        yield from _lists(child, f"{dot}{name}", composite=composite)


def _is_list(module: nn.Module, children: Mapping[str, nn.Module]) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) or all(name.isdigit() for name in children)


def _composite_layers(module: nn.Module, path: str, children: Mapping[str, nn.Module]) -> dict[str, int]:
    """Returns name -> number of the layers that a list holds, where it is a list of layers; single matrices are none."""
    layers = {name: child for name, child in children.items() if children_of(child)}
    if not layers or not _is_list(module, children):
        return {}
    known = _list_name(path) in REPEATED and len(layers) == len(children)
    repeats = max(Counter(_signature(child) for child in layers.values()).values())
    alone = (
        isinstance(module, nn.ModuleList) and len(children) == 1
    )  # a single layer, or a group used several times
    if not (known or alone or repeats > 1):
        return {}
    by_name = len(layers) == len(children) and all(name.isdigit() for name in layers)
    numbers: dict[int, int] = {}  # a layer used several times has the number of its first place
    return {
        name: numbers.setdefault(id(child), int(name) if by_name else i)
        for i, (name, child) in enumerate(layers.items())
    }


def _leaf_layers(module: nn.Module, path: str, children: Mapping[str, nn.Module]) -> dict[str, int]:
    """Returns the same for a list of single modules: one that is called a list of layers, or holds recurrent ones."""
    if not children or not _is_list(module, children) or not all(name.isdigit() for name in children):
        return {}
    recurrent = all(isinstance(child, (nn.RNNBase, nn.RNNCellBase)) for child in children.values())
    return {name: int(name) for name in children} if recurrent or _list_name(path) in REPEATED else {}


def _list_name(path: str) -> str:
    return next(iter(reversed(components(path))), "")


def _signature(module: nn.Module) -> tuple[object, ...]:
    """Returns what makes two layers equal: their class, and a bare container's contents."""
    bare = isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or type(module) is nn.Module
    return (type(module), *(_signature(child) for child in module.children() if bare))


def _convolutional(model: nn.Module, elements: Mapping[str, int]) -> bool:
    """Tells whether layers hold convolutions and norms alone."""
    leaves = [m for path in elements for m in model.get_submodule(path).modules() if m._parameters]
    kinds = [type(leaf).__name__.lower() for leaf in leaves]
    return any("conv" in kind for kind in kinds) and all("conv" in kind or "norm" in kind for kind in kinds)


def _side_by_side(model: nn.Module, lists: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Groups sibling lists of one length that a single loop of their parent's forward pass runs together."""
    groups: list[list[str]] = []
    for path, elements in lists.items():
        parent, _, name = path.rpartition(".")
        loops = loops_of(type(model.get_submodule(parent))) if path else []
        for group in groups:
            other, _, other_name = group[0].rpartition(".")
            together = any({name, other_name} <= loop for loop in loops)
            if other == parent and together and len(lists[group[0]]) == len(elements):
                group.append(path)
                break
        else:
            groups.append([path])
    return groups


def _with_companions(model: nn.Module, group: list[str], lists: Mapping[str, Mapping[str, int]]) -> Stack:
    """Returns a group's stack, with sibling lists of single modules that the same loop runs (a norm for each layer)."""
    numbers = {path: number for one in group for path, number in lists[one].items()}
    parent, _, name = group[0].rpartition(".")
    loops = [loop for loop in loops_of(type(model.get_submodule(parent))) if name in loop]
    companions = []
    for other, module in model.get_submodule(parent)._modules.items():
        path = f"{parent}.{other}" if parent else other
        if not isinstance(module, nn.ModuleList) or path in lists or "embed" in other:
            continue
        if len(module) == len(lists[group[0]]) and any(other in loop for loop in loops):
            companions.append(path)
            numbers |= {f"{path}.{i}": i for i in range(len(module))}
    return Stack(lists=(*group, *companions), numbers=numbers)


def _prefixes(paths: list[str]) -> list[str]:
    """Returns what tells stacks apart: nothing for a single one, else the first component no other one has."""
    if len(paths) < 2:
        return [""] * len(paths)
    split = [[part for part in components(path) if not part.isdigit()] for path in paths]
    shared = set(split[0]).intersection(*split[1:])
    raw = []
    for i, parts in enumerate(split):
        others = {part for j, other in enumerate(split) if j != i for part in other}
        own = next((part for part in parts if part not in others), None)
        if own is None:
            raw.append(".".join(part for part in parts if part not in shared))
        elif parts.index(own) == len(parts) - 1:  # the list's own name: its parent's says more
            above = [part for part in parts[-2:-1] if part not in shared]
            raw.append(".".join([*above, *([] if own in REPEATED else [own])]))
        else:
            raw.append(own)
    short = [next((n.removesuffix(s) for s in _SUFFIXES if n.endswith(s)), n) for n in raw]
    for names in (short, raw, [".".join(parts) for parts in split]):
        if len(set(names)) == len(names):
            return [f"{name}." if name else "" for name in names]
    return [f"{'.'.join(components(path))}." for path in paths]
