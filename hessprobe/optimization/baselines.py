"""First-order training steps on the same outer batch as Gauss-Newton, for comparison and for its warm-up."""

from __future__ import annotations

import math
from typing import Any

import torch

from hessprobe.errors import UserError
from hessprobe.optimization.inner_solver import FirstOrder, hidden_matrices
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.schedule import learning_rate_factor
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition


class FirstOrderOptimizer:
    """AdamW or Muon on the whole outer batch (one step), or on each of its minibatches (one step each).

    Args:
        objective: model and loss; `step` moves the model's parameters in place.
        partition: which parameters move.
        solver: "adamw" or "muon".
        learning_rate, clip, weight_decay: as in torch.optim.
        schedule: "global-cosine" or "constant".
        outer_steps: the length of the run, for the cosine.
        accumulate: one step on the mean gradient of all minibatches; otherwise a step a minibatch.
    """

    def __init__(
        self,
        objective: Objective,
        partition: Partition,
        *,
        solver: str = "adamw",
        learning_rate: float,
        clip: float | None = 1.0,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        outer_steps: int = 1,
        accumulate: bool = True,
    ) -> None:
        self.objective = objective
        self.partition = partition
        self.learning_rate = learning_rate
        self.clip = clip
        self.schedule = schedule
        self.outer_steps = outer_steps
        self.accumulate = accumulate
        self.outer = 0
        named = {n: p for n, p in objective.model.named_parameters() if n in partition.names}
        self.solver = FirstOrder(solver, named, hidden_matrices(objective.model), weight_decay=weight_decay)

    def step(self, batches: list[Batch], line_search_batches: list[Batch] | None = None) -> StepReport:
        """Takes one outer step; line-search data is not read. Cost: a gradient a minibatch.

        Raises:
            UserError: no minibatch.
        """
        if not batches:
            raise UserError("an optimizer step needs at least one minibatch")
        before = self.partition.vector(self.objective.model)
        groups = [batches] if self.accumulate else [[batch] for batch in batches]
        losses, norm = [], math.nan
        for i, group in enumerate(groups):
            factor = learning_rate_factor(
                self.schedule,
                outer=self.outer,
                inner=i,
                outer_steps=self.outer_steps,
                inner_steps=len(groups),
            )
            loss, gradient = self.objective.gradient(group, self.partition)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                break
            found = self.solver.step(
                self.partition.unflatten(gradient), factor * self.learning_rate, self.clip
            )
            norm = found if i == 0 else norm
        self.outer += 1
        after = self.partition.vector(self.objective.model)
        finite = math.isfinite(losses[-1]) and bool(torch.isfinite(after).all())
        return StepReport(
            outcome="accepted" if finite else "diverged: the loss is not finite",
            loss=losses[0],
            gradient_norm=norm,
            update_norm=float((after - before).norm()),
            inner_loss=tuple(losses),
            tokens=self.objective.tokens(batches),
            gradient_equivalents=float(len(batches)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock and the optimizer's state, for a checkpoint."""
        return {"outer": self.outer, "solver": self.solver.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.outer = state["outer"]
        self.solver.load_state_dict(state["solver"])
