"""What one outer step of any optimizer did: the row it leaves in the table `train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One outer step, in the units of the table `train`; NaN where a quantity does not exist for an optimizer.

    Attributes:
        outcome: "accepted", "rejected: why" (parameters unchanged), or "diverged: why" (the loss is not finite). A
            Gauss-Newton step whose inner solve failed and was done again says so: "accepted after 1 retry at learning
            rate 0.005", "accepted after 2 retries at damping 0.16 (conjugate gradients: indefinite: ...)".
        loss: nats per token at the step's start.
        gradient_norm, update_norm: Euclidean norms; of the first minibatch's gradient (of the model of the loss, at the
            inner solve's start; by conjugate gradients: of the loss on the whole outer batch), and of what was added to
            theta.
        step_size: alpha that the line search chose, 0 where it rejected every one.
        line_search_loss: loss at each candidate alpha, by alpha.
        predicted_decrease: of the model of the loss, undamped, at the step taken, on the line search's data.
        actual_decrease: of the loss, on the same data.
        inner_loss: value of the damped model (mean over groups) at each inner step, each on its minibatch; by conjugate
            gradients where they start and where they end, on the whole outer batch.
        inner_iterations: inner steps, or conjugate gradient iterations of the group of blocks that took most, of the
            solve kept; 0 for an optimizer that has no inner problem.
        inner_residual: |g + (G + mu I) delta| / |g| on the whole outer batch, with the blocks of G that the structure
            keeps; known by conjugate gradients alone.
        tokens, line_search_tokens: tokens with a target that this step read to solve and to search, each once; 0 to
            search where the solve's own data judged.
        gradient_equivalents: operations, in gradients of one minibatch, those of failed attempts included.
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
    inner_iterations: int = 0
    inner_residual: float = math.nan
    line_search_tokens: int = 0
