"""The mean loss per token of micro-batches and its gradient, each process at its own pieces, added up over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessprobe.problem.batches import Batch
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.partition import Partition

if TYPE_CHECKING:
    from hessprobe.problem.objective import Objective


def mean_loss(
    objective: Objective, batches: MicroBatches, parameters: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Returns the loss (0-d); see `Objective.loss`."""
    values = []
    for piece in objective.own_pieces(batches):
        z = objective.outputs(piece, parameters)
        batches.check_classes(z.shape[1])
        values.append(objective.loss_function.value(z, objective.targets(piece)))
    if objective.processes.count == 1:
        return torch.stack(values).sum() / batches.weight
    device = next(objective.model.parameters()).device
    whole = torch.zeros((), dtype=torch.float64, device=device) + sum(v.detach() for v in values)
    return objective.processes.total(whole)[0] / batches.weight


def mean_gradient(
    objective: Objective,
    batches: MicroBatches,
    partition: Partition,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the loss (0-d) and its gradient (p,), both detached; see `Objective.gradient`."""
    weight, function = batches.weight, objective.loss_function
    with measuring(objective.model, forward_mode=False):
        leaves = objective.leaves(partition, parameters)
        loss = leaves[partition.names[0]].new_zeros(())
        gradient = None

        def summed(batch: Batch) -> tuple[Tensor, Tensor]:
            z, y = objective.outputs(batch, leaves), objective.targets(batch)
            fixed = z.detach()
            batches.check_classes(z.shape[1])
            part = function.value(fixed, y).detach() / weight
            return part, pull_back(z, leaves, partition.names, function.gradient(fixed, y) / weight)

        for piece in objective.own_pieces(batches):
            part, pulled = with_parameters(objective.model, leaves, lambda piece=piece: summed(piece))
            loss = loss + part
            gradient = pulled if gradient is None else gradient.add_(pulled)
        if gradient is None:  # fewer sequences than processes
            gradient = partition.flatten({n: torch.zeros_like(x) for n, x in leaves.items()}).detach()
    loss, gradient = objective.processes.total(loss, gradient)
    return loss, gradient


def pull_back(
    outputs: Tensor, leaves: Mapping[str, Tensor], names: Sequence[str], cotangent: Tensor
) -> Tensor:
    """Returns J^T cotangent for the named leaves as one vector; a leaf the outputs do not depend on gives zeros."""
    inputs = [leaves[name] for name in names]
    grads = torch.autograd.grad(outputs, inputs, cotangent, allow_unused=True)
    with without_rules():
        return torch.cat(
            [
                (torch.zeros_like(x) if g is None else g).reshape(-1)
                for x, g in zip(inputs, grads, strict=True)
            ]
        )
