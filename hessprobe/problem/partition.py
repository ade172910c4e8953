"""Which parameters belong to which layer: named blocks as slices of one flat parameter vector.

A block is found by exact name components, never by string prefix, so `h.1` does not catch `h.10`.
A tensor shared by two modules (tied embedding and head) is one parameter, in one block.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError, unknown_name

PARTITIONS = ("layer", "module", "parameter")

# Names that training codes give to the three parts of a language model: nanoGPT and GPT-2 (wte, wpe, h, ln_f,
# lm_head), Llama and Qwen (embed_tokens, layers, norm, lm_head), torchtitan (tok_embeddings, layers, norm,
# output), BERT-likes and ours.
_REPEATED = {"h", "blocks", "block", "layers", "layer"}
_EMBEDDING = {"wte", "wpe", "embed_tokens", "embed_positions", "tok_embeddings", "pos_embeddings", "embedding",
              "embeddings", "token_embedding", "position_embedding"}  # fmt: skip
_HEAD = {"lm_head", "head", "output", "score", "classifier", "cls"}
_FINAL_NORM = {"ln_f", "norm", "final_norm", "final_layernorm", "final_layer_norm"}
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter tensor's place in the flat vector."""

    name: str
    shape: torch.Size
    block: str
    start: int
    stop: int


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside torch.compile's and DistributedDataParallel's wrappers (the same tensors)."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _components(name: str) -> list[str]:
    """Splits a parameter name, leaving out what compile, DDP and checkpoint wrappers add."""
    return [part for part in name.split(".") if part not in _WRAPPERS]


def _repeated_position(parts: list[str]) -> int | None:
    """Returns where the number of a repeated layer stands: the first `h.3`, `layers.3`, ... in the name."""
    for i in range(len(parts) - 1):
        if parts[i] in _REPEATED and parts[i + 1].isdigit():
            return i + 1
    return None


def _layer_of(parts: list[str]) -> str | None:
    """Returns `embedding`, `block.N`, `head`, `final_norm`, or None where the name is not recognised."""
    number = _repeated_position(parts)
    if number is not None:
        return f"block.{int(parts[number])}"
    modules = parts[:-1]
    for kind, names in (("embedding", _EMBEDDING), ("head", _HEAD), ("final_norm", _FINAL_NORM)):
        if any(part in names for part in modules):
            return kind
    return None


def _fine_name(name: str, keep_parameter: bool) -> str:
    """Returns `block.3.attention.q` for `blocks.3.attention.q.weight` (the parameter's own name where asked)."""
    parts = _components(name)
    number = _repeated_position(parts)
    if number is not None:
        parts = ["block", *parts[number:]]
    if not keep_parameter and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def _layer_blocks(names: list[str], aliases: Mapping[str, list[str]]) -> tuple[dict[str, str], list[str]]:
    """Assigns each parameter its layer, and lists in words what was not recognised."""
    found = {name: _layer_of(_components(name)) for name in names}
    notes: list[str] = []
    depths = [
        int(kind.removeprefix("block.")) for kind in found.values() if kind and kind.startswith("block.")
    ]
    last = f"block.{max(depths)}" if depths else None
    # The final norm belongs to the last block (the reference study's partition); with no blocks, to the head.
    found = {name: (last or "head") if kind == "final_norm" else kind for name, kind in found.items()}
    tied = any(
        {_layer_of(_components(alias)) for alias in aliases[name]} >= {"embedding", "head"} for name in names
    )
    if tied:
        found = {n: "embedding+head" if kind in ("embedding", "head") else kind for n, kind in found.items()}
    strangers = [name for name, kind in found.items() if kind is None]
    if strangers:
        blocks = sorted({_fine_name(name, keep_parameter=False) for name in strangers})
        notes.append(
            f"layer partition: {len(strangers)} parameters have names that are not recognised as embedding, "
            f"block or head; each takes its module as a block ({', '.join(blocks[:6])}"
            f"{', ...' if len(blocks) > 6 else ''}). Pass a function name -> block to decide yourself."
        )
    return {
        n: _fine_name(n, keep_parameter=False) if kind is None else kind for n, kind in found.items()
    }, notes


def _reading_order(blocks: list[str]) -> list[str]:
    """Orders layer blocks as the model runs: embedding, block.0 ... block.11, the rest as met, head last."""

    def key(item: tuple[int, str]) -> tuple[int, int]:
        position, name = item
        if name.startswith("embedding"):
            return (0, position)
        numbered = re.fullmatch(r"block\.(\d+)", name)
        if numbered:
            return (1, int(numbered[1]))
        return (3, position) if name == "head" else (1, -1) if position == 0 else (2, position)

    return [name for _, name in sorted(enumerate(blocks), key=key)]


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
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise UserError(
                f"{type(model).__name__} has no trainable parameters, so it has no curvature to measure: "
                "set requires_grad on those to be partitioned"
            )
        if not callable(by) and by not in PARTITIONS:
            raise unknown_name("partition", str(by), [*PARTITIONS, "a function name -> block"])
        aliases: dict[str, list[str]] = {name: [] for name in named}
        canonical = {id(p): name for name, p in named.items()}
        for name, p in model.named_parameters(remove_duplicate=False):
            if id(p) in canonical:
                aliases[canonical[id(p)]].append(name)

        notes: list[str] = []
        if callable(by):
            block_of = {name: by(name) for name in named}
        elif by == "layer":
            block_of, notes = _layer_blocks(list(named), aliases)
        else:
            block_of = {name: _fine_name(name, keep_parameter=False) for name in named}
            if by == "parameter":
                # A module's only tensor takes the module's name; several are told apart by their own.
                alone = [list(block_of.values()).count(block) == 1 for block in block_of.values()]
                block_of = {
                    name: block_of[name] if single else _fine_name(name, keep_parameter=True)
                    for name, single in zip(named, alone, strict=True)
                }
        for note in notes:
            warnings.warn(note, stacklevel=2)

        blocks = list(dict.fromkeys(block_of.values()))
        if by == "layer":
            blocks = _reading_order(blocks)
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
        lead = vector.shape[:-1]
        return {s.name: vector[..., s.start : s.stop].reshape(*lead, *s.shape) for s in self.slots}

    def vector(self, model: nn.Module) -> Tensor:
        """Returns a detached copy of the model's parameters as one vector (p,)."""
        named = dict(unwrapped(model).named_parameters())
        return torch.cat([named[slot.name].detach().reshape(-1) for slot in self.slots])

    @torch.no_grad()
    def assign(self, model: nn.Module, vector: Tensor) -> None:
        """Copies a vector (p,) into the model's parameters, in place."""
        named = dict(unwrapped(model).named_parameters())
        for name, value in self.unflatten(vector).items():
            named[name].copy_(value)

    def summary(self) -> str:
        """Returns a table in text: every block, its number of parameters and of tensors; then the notes."""
        sizes = self.sizes
        tensors = {block: len(self.parameters_of(block)) for block in sizes}
        width = max(map(len, sizes))
        lines = [f"{b:<{width}}  {sizes[b]:>13,}  {tensors[b]:>3} tensors" for b in sizes]
        total = f"{'total':<{width}}  {self.size:>13,}  {sum(tensors.values()):>3} tensors"
        return "\n".join([*lines, total, *self.notes])

    def __len__(self) -> int:
        return len(self.blocks)
