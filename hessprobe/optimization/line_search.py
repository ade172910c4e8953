"""How far along a direction: the alpha of a fixed grid with the least true loss on fresh data.

The reference study's grid is alpha = 2^(-i/2); it takes the best of the grid even where all of them lose. Here
alpha = 0 is a candidate too, so a step that only harms is rejected, and the real decrease is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition


@dataclass(frozen=True, kw_only=True)
class LineSearch:
    """The losses along a direction and the best step.

    Attributes:
        step_size: the alpha with the least finite loss; 0 where none is below the loss at 0.
        losses: loss in nats per token by alpha, the grid's alone.
        start: the loss at alpha = 0.
        tokens: tokens read once (they serve every alpha).
    """

    step_size: float
    losses: dict[float, float]
    start: float
    tokens: int

    @property
    def decrease(self) -> float:
        """How much the loss fell at the step size taken."""
        return self.start - self.losses.get(self.step_size, self.start)


def step_sizes(count: int) -> tuple[float, ...]:
    """Returns the study's grid 2^(-i/2) for i = 0 .. count - 1.

    Raises:
        UserError: an empty grid.
    """
    if count < 1:
        raise UserError(f"line search: the grid of step sizes needs at least 1 entry, got {count}")
    return tuple(2 ** (-i / 2) for i in range(count))


def search(
    objective: Objective,
    partition: Partition,
    theta: Tensor,
    direction: Tensor,
    batches: Batch | Sequence[Batch],
    grid: tuple[float, ...],
) -> LineSearch:
    """Returns the losses at theta + alpha * direction for alpha in the grid, and the best.

    Cost: (len(grid) + 1) forward passes over the batches, a third of a gradient each.
    """
    listed = objective.micro_batches(batches)
    found: dict[float, float] = {}
    with measuring(objective.model, forward_mode=False), torch.no_grad():
        for alpha in (0.0, *grid):
            parameters = partition.unflatten(theta + alpha * direction)
            found[alpha] = float(objective.loss(listed, parameters))
    start = found.pop(0.0)
    finite = {alpha: loss for alpha, loss in found.items() if math.isfinite(loss)}
    best = min(finite, key=lambda alpha: finite[alpha], default=0.0)
    improved = best in finite and finite[best] < start
    return LineSearch(step_size=best if improved else 0.0, losses=found, start=start, tokens=listed.tokens)
