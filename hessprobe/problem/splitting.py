"""Whether a batch may be measured in pieces of its sequences, and what is said where outputs and targets do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.measuring import measuring

if TYPE_CHECKING:
    from hessprobe.problem.batches import Batch
    from hessprobe.problem.objective import Objective


def agree(objective: Objective, batch: Batch, pieces: Sequence[Batch]) -> bool | None:
    """Tells whether pieces have the targets and outputs of the batch they make up; None where outputs are all zero.

    Pieces that cannot be run do not. Cost: two forward passes of the batch.
    """
    with measuring(objective.model, forward_mode=False), torch.no_grad():
        whole = objective.outputs(batch)
        try:
            parts = [objective.targets(piece) for piece in pieces]
            if not torch.equal(torch.cat(parts), objective.targets(batch)):
                return False
            joined = torch.cat([objective.outputs(piece) for piece in pieces])
        except (
            Exception
        ) as error:  # whatever forward=, targets= or the model say of a batch they are not made for
            if is_out_of_memory(error):
                raise
            return False
    if joined.shape != whole.shape:
        return False
    if not bool(whole.any()) and not bool(joined.any()):
        return None
    gap = (whole - joined).norm() / whole.norm()
    return bool(gap <= torch.finfo(whole.dtype).eps ** 0.6)  # rounding's, not another model's


def do_not_fit(outputs: Sequence[int], targets: Tensor, *, batch_first: bool) -> str:
    """Returns the sentence on outputs and targets (shapes with sequences first) that are not of the same tokens."""
    z, y = tuple(outputs), tuple(targets.shape)
    if batch_first:
        return (
            f"outputs {z} do not fit targets {y}: wanted one target per token with the class dimension of the outputs "
            "last, outputs (sequences, positions, classes) and targets (sequences, positions), or (sequences, classes) and "
            "(sequences,); forward= and targets= say how they come"
        )
    z, y = (*z[1::-1], *z[2:]), (*y[1::-1], *y[2:])  # as they came
    return (
        f"outputs {z} do not fit targets {y}: with batch_first=False outputs must be (positions, sequences, classes) and "
        "targets (positions, sequences): where they come flat, give them their shape back in forward= and targets=, as in "
        "forward=lambda model, batch: model(batch[0]).view(*batch[0].shape, -1), targets=lambda batch: "
        "batch[1].view_as(batch[0])"
    )
