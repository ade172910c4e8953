"""Which part of a training step's batch a probe reads, and where it lies: on the model's device, its first sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hessprobe.problem.batches import cut, is_tensor_list
from hessprobe.problem.objective import Batch, Objective


def placed(batch: Any, device: torch.device) -> Any:
    """Returns a batch, or a list of micro-batches, with its tensors on the device; detached, and else as it is."""
    return _with_tensors(batch, lambda x: x.detach().to(device))


def first_sequences(objective: Objective, batches: list[Batch], limit: int) -> list[Batch]:
    """Returns the first sequences of the micro-batches, at most `limit` of them.

    Raises:
        UserError: a batch that holds more cannot be cut.
    """
    found, left = [], limit
    for batch in batches:
        count, _ = objective.sequence_shape(batch)
        if left > 0:
            found.append(batch if count <= left else cut(batch, 0, left, count))
        left -= count
    return found


def own_sequences(objective: Objective, batch: Batch | list[Batch], limit: int) -> list[Batch]:
    """Returns what one of several processes sends the others: its first sequences, in memory of their own on the CPU."""
    listed = batch if isinstance(batch, list) and not is_tensor_list(batch) else [batch]
    held = [own for own in listed if objective.targets(own).numel()]  # a process may have had nothing to read
    return _with_tensors(
        first_sequences(objective, held, limit), lambda x: x.detach().to("cpu", copy=True).contiguous()
    )


def _with_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _with_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, list):
        return [_with_tensors(value, function) for value in batch]
    if isinstance(batch, tuple):
        return tuple(_with_tensors(value, function) for value in batch)
    return batch
