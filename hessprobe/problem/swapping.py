"""Other tensors in the places of a model's parameters: every place that holds one, each once, and back whatever happens.

A place is an entry of some module's `_parameters` or `_buffers`, or of a list, tuple or dictionary in a plain attribute (an
LSTM's `_flat_weights`). Places belong to module objects, not to names: a module registered under two names has one set of
them, and a tensor tied to another has several.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.operation_rules import without_rules

HALF = (torch.float16, torch.bfloat16)
# What nn.Module itself keeps in a module's __dict__.
OWN = frozenset(nn.Module().__dict__)
CHANGED = "the parameters have changed since the recorder was made: make another"
LARGEST = 4096  # entries of a container that is searched; a longer one is data
_CONTAINERS = (list, tuple, dict)
_SEARCHED = (Tensor, *_CONTAINERS)
_NEVER = frozenset(
    {int, float, bool, str, type(None)}
)  # hold no tensor: what most modules have, told at once


def swapped(model: nn.Module, leaves: Mapping[str, Tensor]) -> Callable[[], None]:
    """Puts the leaves in the parameters' places and returns what takes them out again.

    Where the leaves (or, without any, the trainable parameters) are of float32 or more, parameters and buffers of half
    precision beside them are put there in the leaves' precision too, so that all of the model computes in it.

    Raises:
        UserError: a leaf's name or shape is no longer that of a parameter.
    """
    by_id: dict[int, nn.Module] = {}
    _collect(model, by_id)
    modules = [*by_id.values()]
    given: dict[int, Tensor] = {}
    for name, leaf in leaves.items():
        there = parameter_named(model, name)
        if there is None or there.shape != leaf.shape:
            was = f"no parameter {name!r}" if there is None else f"{name!r} is {tuple(there.shape)} now"
            raise UserError(f"{CHANGED} ({was})")
        given[id(there)] = leaf
    wide = _precision(modules, leaves)
    undo: list[tuple[Any, Any, Any]] = []

    def back() -> None:
        for container, key, value in reversed(undo):
            container[key] = value

    try:
        _exchange(modules, given, wide, bool(leaves), undo)
    except BaseException:  # no memory for a part in higher precision
        back()
        raise
    return back


def _exchange(
    modules: list[nn.Module],
    given: dict[int, Tensor],
    wide: torch.dtype | None,
    leaves: bool,
    undo: list[tuple[Any, Any, Any]],
) -> None:
    """Fills all places, and notes what was in them."""
    for module in modules:
        attributes = module.__dict__
        for own in (attributes["_parameters"], attributes["_buffers"]):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                leaf = given.get(id(tensor))
                if leaf is None and wide is not None and tensor.dtype in HALF:
                    leaf = given[id(tensor)] = tensor.detach().to(wide)
                elif leaf is None and leaves and tensor.requires_grad and tensor.is_leaf:
                    leaf = given[id(tensor)] = tensor.detach()  # no graph begins anywhere but at the leaves
                if leaf is not None:
                    undo.append((own, name, tensor))
                    own[name] = leaf
        plain = plain_values(attributes)
        if _NEVER.issuperset(map(type, plain)):
            continue
        for value in plain:
            if isinstance(value, _SEARCHED):
                name = next(key for key, held in attributes.items() if held is value)
                new = _exchanged(value, given, undo, 0)
                if new is not value:
                    undo.append((attributes, name, value))
                    attributes[name] = new


def plain_values(attributes: dict[str, Any]) -> list[Any]:
    """Returns what lies in a module's __dict__ beside what nn.Module keeps there."""
    values = [*attributes.values()]
    count = len(OWN)
    if len(values) >= count and values[count - 1] is attributes["_modules"]:  # its own came first
        return values[count:]
    return [value for name, value in attributes.items() if name not in OWN]


def _collect(module: nn.Module, found: dict[int, nn.Module]) -> None:
    """Collects every module object once, as nn.Module.modules does in three times as long."""
    found[id(module)] = module
    for part in module.__dict__["_modules"].values():
        if part is not None and id(part) not in found:
            _collect(part, found)


def parameter_named(model: nn.Module, name: str) -> nn.Parameter | None:
    """Returns what is in a parameter's place, or None where there is none of that name."""
    path, _, own = name.rpartition(".")
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = module._modules.get(part)
        if module is None:
            return None
    return module._parameters.get(own)


def _precision(modules: list[nn.Module], leaves: Mapping[str, Tensor]) -> torch.dtype | None:
    """Returns float32 or float64 where that is what is measured in, else None."""
    dtype = common_dtype(leaves.values() if leaves else _trainable(modules))
    return dtype if dtype in (torch.float32, torch.float64) else None


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Returns the type that floating-point tensors have in common: the highest precision among them; None without any."""
    found: torch.dtype | None = None
    for tensor in tensors:
        if tensor.dtype is not found and tensor.is_floating_point():
            found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    return found


def fresh_leaves(
    source: Mapping[str, Tensor], names: Sequence[str], wanted: Collection[str]
) -> dict[str, Tensor]:
    """Returns tensors by name that share the sources' memory, in their highest precision; those wanted want gradients."""
    with without_rules():
        dtype = common_dtype(source.values())
        return {n: source[n].detach().to(dtype).requires_grad_(n in wanted) for n in names}


def _trainable(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for tensor in module._parameters.values():
            if tensor is not None and tensor.requires_grad:
                yield tensor


def _exchanged(value: Any, given: Mapping[int, Tensor], undo: list[tuple[Any, Any, Any]], depth: int) -> Any:
    """Returns a plain attribute's value with the leaves in it: lists and dictionaries in place, tuples made anew."""
    if isinstance(value, Tensor):
        return given.get(id(value), value)
    if not isinstance(value, _CONTAINERS) or depth > 8 or len(value) > LARGEST:
        return value
    if isinstance(value, tuple):
        parts = [_exchanged(part, given, undo, depth + 1) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        new = _exchanged(part, given, undo, depth + 1)
        if new is not part:
            undo.append((value, key, part))
            value[key] = new
    return value
