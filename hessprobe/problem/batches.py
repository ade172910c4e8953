"""What a batch is: a pair (inputs, targets), or a mapping with "labels"; how to read one, and how to cut one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hessprobe.errors import UserError

Batch = Any  # (inputs, targets), a Hugging Face mapping with "labels", or whatever forward= and targets= take


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """Returns the batch as that many batches of its sequences, or whole where its entries do not share a length."""
    entries = dict(batch.items() if isinstance(batch, Mapping) else enumerate(batch))
    counts = {x.shape[0] if isinstance(x, Tensor) and x.dim() else None for x in entries.values()}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or count < 2:
        return [batch]
    size = -(-count // pieces)
    parts = []
    for start in range(0, count, size):
        part = {key: x[start : start + size] for key, x in entries.items()}
        parts.append(part if isinstance(batch, Mapping) else tuple(part.values()))
    return parts


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
