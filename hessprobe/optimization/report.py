"""What one outer step of any optimizer did: the row it leaves in the table `train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One outer step, in the units of the table `train`; NaN where a quantity does not exist for an optimizer.

    Attributes:
        outcome: "accepted", "rejected: why" (parameters unchanged), or "diverged: why" (the loss is not finite).
        loss: nats per token at the step's start.
        gradient_norm, update_norm: Euclidean norms; of the first minibatch's gradient, of what was added to theta.
        step_size: alpha that the line search chose, 0 where it rejected every one.
        line_search_loss: loss at each candidate alpha, by alpha.
        predicted_decrease: of the model of the loss at the step taken, on the line search's data.
        actual_decrease: of the loss, on the same data.
        inner_loss: the inner problem's loss at each inner step.
        tokens, line_search_tokens: tokens with a target that this step read to solve and to search.
        gradient_equivalents: operations, in gradients of one minibatch.
    """

    outcome: str
    loss: float
    gradient_norm: float
    update_norm: float
    tokens: int
    gradient_equivalents: float
    step_size: float = math.nan
    line_search_loss: dict[float, float] = field(default_factory=dict)
    predicted_decrease: float = math.nan
    actual_decrease: float = math.nan
    inner_loss: tuple[float, ...] = ()
    line_search_tokens: int = 0
