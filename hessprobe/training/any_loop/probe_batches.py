"""Which part of a training step's batch a probe reads, and where it lies: on the model's device, its first sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessprobe.probes.probe import Probe
from hessprobe.problem.batches import cut
from hessprobe.problem.objective import Batch, Objective


def placed(batch: Any, device: torch.device) -> Any:
    """Returns a batch, or a list of micro-batches, with its tensors on the device; detached, and else as it is."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device)
    if isinstance(batch, Mapping):
        return {key: placed(value, device) for key, value in batch.items()}
    if isinstance(batch, list):
        return [placed(value, device) for value in batch]
    if isinstance(batch, tuple):
        return tuple(placed(value, device) for value in batch)
    return batch


def first_sequences(objective: Objective, batches: list[Batch], probe: Probe) -> list[Batch]:
    """Returns the first sequences of the micro-batches, as many as the probe's table was laid out for.

    Raises:
        UserError: a batch that holds more cannot be cut.
    """
    found, left = [], probe.sequences
    for batch in batches:
        count, _ = objective.sequence_shape(batch)
        if left > 0:
            found.append(batch if count <= left else cut(batch, 0, left, count))
        left -= count
    return found
