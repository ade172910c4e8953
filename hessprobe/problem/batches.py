"""What a batch is: a pair (inputs, targets), or a mapping with "labels"; how to read one, and how to cut one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hessprobe.errors import UserError

Batch = Any  # (inputs, targets), a Hugging Face mapping with "labels", or whatever forward= and targets= take


def pieces_of(batch: Batch, pieces: int) -> list[Batch]:
    """Returns the batch as that many batches of its sequences, or whole where its entries do not share a length."""
    entries = batch.values() if isinstance(batch, Mapping) else batch
    counts = {x.shape[0] if isinstance(x, Tensor) and x.dim() else None for x in entries}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or count < 2:
        return [batch]
    size = -(-count // pieces)
    return [cut(batch, start, min(start + size, count), count) for start in range(0, count, size)]


def cut(batch: Batch, start: int, stop: int, count: int) -> Batch:
    """Returns sequences start to stop of a batch of `count`: of every tensor whose first dimension counts them.

    Raises:
        UserError: a batch that is neither a mapping nor a tuple or list.
    """

    def part(x: object) -> object:
        return x[start:stop] if isinstance(x, Tensor) and x.dim() and x.shape[0] == count else x

    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(part(x) for x in batch)
    raise UserError(f"cannot take single sequences from a batch of type {type(batch).__name__}")


def is_tensor_list(batch: object) -> bool:
    """Tells a DataLoader's [inputs, targets] from a list of micro-batches."""
    return isinstance(batch, list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)


def default_forward(model: nn.Module, batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False
        found = model(**inputs)
    else:
        found = model(batch[0])
    z = getattr(found, "logits", found)
    if not isinstance(z, Tensor):
        raise UserError(
            f"{type(model).__name__} returned {type(found).__name__}: wanted a tensor of outputs or an object with "
            ".logits; pass forward=lambda model, batch: ... to pick it out"
        )
    return z


def default_targets(batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise UserError(
                f"the batch has keys {', '.join(batch)} but no 'labels'; pass targets= to say where they are"
            )
        return batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UserError(
            f"wanted a batch (inputs, targets) or a mapping with 'labels', got {type(batch).__name__}; pass forward= "
            "and targets= to take it apart"
        )
    return batch[1]
