"""Which parameters belong to which layer: named blocks as slices of one flat parameter vector.

Layers are found by the model's structure (stacks, layer_roles), by names only where it shows none.
A tensor shared by two modules (tied embedding and head) is one parameter, in one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError, unknown_name, warn
from hessprobe.problem.layer_names import fine_name, reading_order
from hessprobe.problem.layer_roles import layer_of_names
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.parameter_kinds import check_kinds, present
from hessprobe.problem.stacks import Stacks, stacks_of

PARTITIONS = ("layer", "module", "parameter")
_TIED = "embedding+head"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter tensor's place in the flat vector."""

    name: str
    shape: torch.Size
    block: str
    start: int
    stop: int


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers of torch.compile, DistributedDataParallel and Fabric (the same tensors)."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        elif hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        elif "_forward_module" in model._modules and "_original_module" in model._modules:
            # Fabric's, whose own forward switches autocast on and minds how backward is called.
            inner = model._original_module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Named blocks of a model's trainable parameters, each one slice of a flat vector of length p."""

    slots: tuple[Slot, ...]
    kind: str = "layer"
    notes: tuple[str, ...] = ()
    _by_name: dict[str, Slot] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module, by: str | Callable[[str], str] = "layer") -> Partition:
        """Returns the partition of a model's trainable parameters.

        Args:
            model: any module; parameters with `requires_grad=False` are left out (frozen, LoRA bases).
            by: "layer" (embedding, block.0 ..., head), "module" (every leaf module), "parameter" (every
                tensor), or a function from a parameter's name to its block's name.

        Raises:
            UserError: no trainable parameters, or an unknown kind of partition.
        """
        model = unwrapped(model)
        check_kinds(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise UserError(
                f"{type(model).__name__} has no trainable parameters, so it has no curvature to measure: "
                "set requires_grad on those to be partitioned"
            )
        if not callable(by) and by not in PARTITIONS:
            raise unknown_name("partition", str(by), [*PARTITIONS, "a function name -> block"])
        notes: list[str] = []
        stacks = stacks_of(model)
        if callable(by):
            block_of = {name: by(name) for name in named}
        elif by == "layer":
            block_of, notes = _layers(model, named, stacks)
        else:
            block_of = {name: fine_name(name, stacks, keep_parameter=False) for name in named}
            if by == "parameter":
                # A module's only tensor takes the module's name; several are told apart by their own.
                alone = [list(block_of.values()).count(block) == 1 for block in block_of.values()]
                block_of = {
                    name: block_of[name] if single else fine_name(name, stacks, keep_parameter=True)
                    for name, single in zip(named, alone, strict=True)
                }
        for note in notes:
            warn(note)

        blocks = list(dict.fromkeys(block_of.values()))
        if by == "layer":
            blocks = reading_order(blocks, stacks)
        slots, start = [], 0
        for block in blocks:
            for name, p in named.items():
                if block_of[name] == block:
                    stop = start + p.numel()
                    slots.append(Slot(name=name, shape=p.shape, block=block, start=start, stop=stop))
                    start = stop
        return cls(slots=tuple(slots), kind="custom" if callable(by) else by, notes=tuple(notes))

    def __post_init__(self) -> None:
        self._by_name.update({slot.name: slot for slot in self.slots})

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks' names in the order of the flat vector; l of them."""
        return tuple(dict.fromkeys(slot.block for slot in self.slots))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names in the order of the flat vector."""
        return tuple(self._by_name)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters' shapes by name, in the order of the flat vector."""
        return {slot.name: slot.shape for slot in self.slots}

    @property
    def size(self) -> int:
        """p, the number of partitioned parameters."""
        return self.slots[-1].stop

    @property
    def slices(self) -> dict[str, slice]:
        """Each block's slice of the flat vector."""
        found: dict[str, slice] = {}
        for slot in self.slots:
            first = found.get(slot.block)
            found[slot.block] = slice(first.start if first else slot.start, slot.stop)
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """Each block's number of parameters."""
        return {block: where.stop - where.start for block, where in self.slices.items()}

    def parameters_of(self, block: str) -> tuple[str, ...]:
        """Returns the names of one block's parameters.

        Raises:
            UserError: no such block; the valid names are listed.
        """
        self.check(block)
        return tuple(slot.name for slot in self.slots if slot.block == block)

    def check(self, *blocks: str) -> None:
        """Raises a UserError that lists the valid names where a block does not exist."""
        for block in blocks:
            if block not in self.blocks:
                raise unknown_name("block", block, self.blocks)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns (..., p) from tensors by parameter name, each (..., *shape)."""
        parts = []
        for slot in self.slots:
            t = tensors[slot.name]
            lead = t.shape[: t.dim() - len(slot.shape)]
            parts.append(t.reshape(*lead, slot.stop - slot.start))
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Returns views by parameter name, each (..., *shape), of a vector (..., p)."""
        with without_rules():
            lead = vector.shape[:-1]
            return {
                s.name: vector.narrow(-1, s.start, s.stop - s.start).reshape((*lead, *s.shape))
                for s in self.slots
            }

    def vector(self, model: nn.Module) -> Tensor:
        """Returns a detached copy of the model's parameters as one vector (p,)."""
        named = present(unwrapped(model), self.shapes)
        return torch.cat([named[slot.name].detach().reshape(-1) for slot in self.slots])

    @torch.no_grad()
    def assign(self, model: nn.Module, vector: Tensor) -> None:
        """Copies a vector (p,) into the model's parameters, in place."""
        named = present(unwrapped(model), self.shapes)
        for name, value in self.unflatten(vector).items():
            named[name].copy_(value)

    def summary(self, routes: Mapping[str, str] | None = None) -> str:
        """Returns a table in text: every block, its number of parameters and of tensors; then the notes.

        Args:
            routes: the way each parameter was measured, by name (`LayerKernels.routes`); every block then shows how
                many of its parameters took which way.
        """
        rows = [(block, [s for s in self.slots if s.block == block]) for block in self.blocks]
        rows.append(("total", list(self.slots)))
        width, lines = max(len(label) for label, _ in rows), []
        for label, slots in rows:
            ways: dict[str, int] = {}
            for slot in slots:
                way = (routes or {}).get(slot.name, "not measured")
                ways[way] = ways.get(way, 0) + slot.stop - slot.start
            shown = "  " + ", ".join(f"{way} {count:,}" for way, count in ways.items()) if routes else ""
            lines.append(f"{label:<{width}}  {sum(ways.values()):>13,}  {len(slots):>3} tensors{shown}")
        return "\n".join([*lines, *self.notes])

    def __len__(self) -> int:
        return len(self.blocks)


def inner_parameters(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the trainable parameters that belong neither to the embedding nor to the head."""
    model = unwrapped(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers, _ = _layers(model, named, stacks_of(model))
    return tuple(name for name in named if layers[name] not in ("embedding", "head", _TIED))


def _layers(
    model: nn.Module, named: Mapping[str, nn.Parameter], stacks: Stacks
) -> tuple[dict[str, str], list[str]]:
    """Assigns each parameter its layer, and lists in words what was not recognised."""
    first = {id(p): name for name, p in named.items()}
    aliases: dict[str, list[str]] = {name: [] for name in named}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in first:
            aliases[first[id(p)]].append(name)
    found, tied = layer_of_names(aliases, named, model, stacks)
    if tied:
        found = {n: _TIED if layer in ("embedding", "head") else layer for n, layer in found.items()}
    strangers = {n: fine_name(n, stacks, keep_parameter=False) for n, layer in found.items() if layer is None}
    if not strangers:
        return {n: layer for n, layer in found.items() if layer is not None}, []
    blocks = sorted(set(strangers.values()))
    note = (
        f"layer partition: {len(strangers)} parameters have names that are not recognised as embedding, "
        f"block or head; each takes its module as a block ({', '.join(blocks[:6])}"
        f"{', ...' if len(blocks) > 6 else ''}). Pass a function name -> block to decide yourself."
    )
    return {n: layer or strangers[n] for n, layer in found.items()}, [note]
