"""What a model's modules keep between forward passes beside their parameters, and how it is put back.

Buffers, and whatever lies in plain attributes: hidden states, running means, caches, counters, generators of random
numbers, in containers and objects of any depth. Objects stay the same objects: what was written into them is undone.
"""

from __future__ import annotations

import pickle
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessprobe.problem.swapping import LARGEST, plain_values

# Never state: they do not change, or belong to no module.
_ATOMS = frozenset({
    int, float, bool, str, complex, bytes, type(None), type(...), type, range, slice, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, nn.Parameter, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType,
})  # fmt: skip
# Objects of these packages own models, or are owned by no model: trainers, optimizers, loaders, process groups.
_OWNERS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "accelerate",
           "deepspeed", "logging", "threading", "multiprocessing", "concurrent", "weakref", "hessprobe")  # fmt: skip
OBJECTS = 2000  # objects searched for state in one attribute
SMALL = 4096  # entries of a tensor that is compared after every forward pass: running means are no larger
COPIED = 2**26  # bytes of tensors copied for one forward pass; of what is larger, changes are only noticed


class ModuleState:
    """The state of a model's modules as it is now.

    Args:
        copied: bytes of tensors that are copied, the smallest of a module first come; None for all. What is written into
            one that was not copied cannot be put back, and `restore` says so.

    Cost: some microseconds a module, and a copy of the buffers.
    """

    def __init__(self, model: nn.Module, copied: int | None = COPIED) -> None:
        self._left, self._everything = copied, copied is None
        self._seen: set[int] = set()
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._owners: list[tuple[nn.Module, Tensor]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, int, Tensor | None]] = []
        self._setters: list[Callable[[], None]] = []
        self._marks: list[tuple[str, Any, Any]] = []
        self._add_module("", model)
        self._versions = [_version(parameter) for _, parameter in self._owners]

    def restore(self) -> list[str]:
        """Puts everything back; returns the names of what has changed and could not be."""
        for now, was in self._attributes:
            if len(now) != len(was) or not all(map(is_, now.values(), was.values())):
                _as_before(now, was)
        for now, was in self._containers:
            _filled_as_before(now, was)
        for put_back in self._setters:
            put_back()
        lost = []
        for name, tensor, version, copy in self._tensors:
            if _version(tensor) != version or version < 0 or (copy is not None and self._compares(copy)):
                if copy is not None:
                    _written_back(tensor, copy)
                elif version >= 0:
                    lost.append(name)
        for (module, parameter), version in zip(self._owners, self._versions, strict=True):
            if _version(parameter) != version:
                own = [name for name, held in module._parameters.items() if held is parameter]
                lost.append(f"{type(module).__name__}'s {', '.join(own)}")
        return lost + [name for name, value, mark in self._marks if _mark(value) != mark]

    def _compares(self, copy: Tensor) -> bool:
        """Tells whether a tensor is compared although torch counts no write: batch_norm's kernels write uncounted."""
        return self._everything or copy.numel() <= SMALL

    def _add_module(self, prefix: str, module: nn.Module) -> None:
        self._seen.add(id(module))
        attributes = module.__dict__
        self._attributes.append((attributes, attributes.copy()))
        self._owners += [(module, p) for p in attributes["_parameters"].values() if p is not None]
        buffers, modules = attributes["_buffers"], attributes["_modules"]
        if buffers:
            unsaved = attributes["_non_persistent_buffers_set"]
            self._containers += [(buffers, buffers.copy()), (unsaved, unsaved.copy())]
            for name, buffer in buffers.items():
                if buffer is not None:
                    self._add_tensor(f"{prefix}{name}", buffer)
        plain = plain_values(attributes)
        if not _ATOMS.issuperset(map(type, plain)):
            for value in (value for value in plain if type(value) not in _ATOMS):
                name = next(key for key, held in attributes.items() if held is value)
                self._objects = 0
                self._add(f"{prefix}{name}", value)
        if modules:
            self._attributes.append((modules, modules.copy()))
            for name, part in modules.items():
                if part is not None and id(part) not in self._seen:
                    self._add_module(f"{prefix}{name}.", part)

    def _add(self, name: str, value: Any) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        if isinstance(value, nn.Module):
            self._add_module(f"{name}.", value)
        elif isinstance(value, Tensor):
            self._add_tensor(name, value)
        elif isinstance(value, (list, tuple, dict, set, deque, bytearray, np.ndarray)):
            self._add_container(name, value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._keep(value, lambda: value.set_state(state) and None)
        elif isinstance(value, random.Random):
            numbers = value.getstate()
            self._keep(value, lambda: value.setstate(numbers))
        elif isinstance(value, np.random.RandomState):
            drawn = value.get_state()
            self._keep(value, lambda: value.set_state(drawn))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            found = pickle.loads(pickle.dumps(bits.state))
            self._keep(value, lambda: setattr(bits, "state", found))
        elif hasattr(type(value), "__next__"):
            self._seen.add(id(value))
            self._marks.append((name, value, _mark(value)))
        else:
            self._add_object(name, value)

    def _keep(self, value: Any, put_back: Callable[[], None]) -> None:
        self._seen.add(id(value))
        self._setters.append(put_back)

    def _add_tensor(self, name: str, tensor: Tensor) -> None:
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        copy = None
        if self._left is None or tensor.numel() * tensor.element_size() <= self._left:
            with torch.no_grad():
                copy = tensor.detach().clone()
            if self._left is not None:
                self._left -= tensor.numel() * tensor.element_size()
        self._tensors.append((name, tensor, _version(tensor), copy))

    def _add_container(self, name: str, value: Any) -> None:
        self._seen.add(id(value))
        if not isinstance(value, tuple):
            self._containers.append((value, value.copy()))
        if len(value) > LARGEST or isinstance(value, (bytearray, np.ndarray)):
            return
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(parts):
            if type(part) not in _ATOMS:
                self._add(f"{name}[{key!r}]", part)

    def _add_object(self, name: str, value: Any) -> None:
        self._objects += 1
        if self._objects > OBJECTS or type(value).__module__.partition(".")[0] in _OWNERS:
            return
        self._seen.add(id(value))
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._containers.append((attributes, dict(attributes)))
            for key, part in list(attributes.items()):
                if type(part) not in _ATOMS:
                    self._add(f"{name}.{key}", part)
        for slot in _slots(type(value)):
            part = getattr(value, slot, _slots)
            if part is not _slots:
                self._setters.append(lambda slot=slot, part=part: object.__setattr__(value, slot, part))
                self._add(f"{name}.{slot}", part)


def _as_before(now: dict[str, Any], was: dict[str, Any]) -> None:
    """Gives a module's __dict__, or its modules, what was there, in the order in which it was there."""
    for key in [key for key in now if key not in was]:
        del now[key]
    now.update(was)
    if [*now] != [*was]:  # modules run in this order
        now.clear()
        now.update(was)


def _filled_as_before(now: Any, was: Any) -> None:
    """Gives a container what it held: only where it holds something else, for its own methods may do more."""
    if isinstance(now, (np.ndarray, bytearray)):
        now[:] = was
    elif isinstance(now, dict):
        if (
            len(now) != len(was)
            or not all(map(is_, now, was))
            or not all(map(is_, now.values(), was.values()))
        ):
            now.clear()
            now.update(was)
    elif isinstance(now, set):
        if now != was:
            now.clear()
            now.update(was)
    elif len(now) != len(was) or not all(map(is_, now, was)):
        now.clear()
        now.extend(was)


@torch.no_grad()
def _written_back(tensor: Tensor, copy: Tensor) -> None:
    """Undoes what was written in place, its history too."""
    if tensor.grad_fn is not None and not copy.requires_grad:
        tensor.detach_()
    if tensor.shape != copy.shape:
        tensor.set_(copy.clone())  # pyright: ignore[reportCallIssue, reportArgumentType]
    elif not torch.equal(tensor, copy):
        tensor.copy_(copy)


def _version(tensor: Tensor) -> int:
    """Returns how often a tensor was written to; -1 where torch does not count (made in inference mode)."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def _mark(value: Any) -> Any:
    """Returns what tells where an iterator stands, which cannot be put back."""
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return None if frame is None else (frame.f_lasti, repr(frame.f_locals))
    try:
        return pickle.dumps(value)
    except Exception:
        return repr(value)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__"):
                yield slot
