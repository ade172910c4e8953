"""One outer Gauss-Newton step: minimise a model of the loss around theta, then search along the way there.

ONE step = model (quadratic | prox-linear) x structure (full | layerwise | any groups of blocks) x inner solver
x line search x warm start x schedule. The structure is a list of groups solved independently at the same theta on
the same minibatches: full Gauss-Newton has one group of all blocks, layerwise one group per block.
Source: Abreu, Vyas, Kakade, Morwani 2025 (arXiv 2510.09378), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.optimization.inner_solver import FirstOrder, hidden_matrices
from hessprobe.optimization.line_search import search, step_sizes
from hessprobe.optimization.local_model import local_gradient, predicted_decrease
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.schedule import learning_rate_factor
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

STRUCTURES = ("full", "layerwise")
PRODUCT_COST, FORWARD_COST = 5 / 3, 1 / 3  # gradient-equivalents by operation count


@dataclass(frozen=True, kw_only=True)
class GaussNewtonSettings:
    """How the inner problem is posed and solved; defaults are the reference study's.

    Attributes:
        structure: "full" or "layerwise".
        model: "quadratic" or "prox-linear".
        solver: "muon" or "adamw".
        learning_rate, schedule, clip: of the inner steps; clip bounds each group's gradient norm.
        line_search_grid: number of step sizes 2^(-i/2) tried.
        warm_start: whether the inner solve starts at the last inner solution, its optimizer state kept.
        outer_steps: length of the run, for "global-cosine".
    """

    structure: str = "full"
    model: str = "quadratic"
    solver: str = "muon"
    learning_rate: float = 0.02
    schedule: str = "global-cosine"
    clip: float | None = 1.0
    line_search_grid: int = 5
    warm_start: bool = True
    outer_steps: int = 1


class GaussNewtonOptimizer:
    """Full or layerwise Gauss-Newton for any model with forward-mode derivatives.

    Args:
        objective: model and loss; `step` moves the model's parameters in place.
        partition: the blocks; for "layerwise" each is solved on its own.
        settings: see GaussNewtonSettings.
    """

    def __init__(self, objective: Objective, partition: Partition, settings: GaussNewtonSettings) -> None:
        if settings.structure not in STRUCTURES:
            raise unknown_name("structure", settings.structure, STRUCTURES)
        self.objective = objective
        self.partition = partition
        self.settings = settings
        self.grid = step_sizes(settings.line_search_grid)
        if settings.structure == "full":
            self.groups = [partition.names]
        else:
            self.groups = [partition.parameters_of(block) for block in partition.blocks]
        self.outer = 0
        self._hidden = hidden_matrices(objective.model)
        self._start_inner(partition.vector(objective.model))

    def _start_inner(self, theta: Tensor) -> None:
        """Puts every group's inner solution at theta, with fresh optimizer states."""
        self.inner = {name: x.clone() for name, x in self.partition.unflatten(theta).items()}
        self.solvers = [
            FirstOrder(self.settings.solver, {n: self.inner[n] for n in names}, self._hidden)
            for names in self.groups
        ]

    def step(self, batches: list[Batch], line_search_batches: list[Batch]) -> StepReport:
        """Takes one outer step: an inner step per minibatch, then the line search on fresh data.

        Args:
            batches: the outer batch as minibatches; each serves one inner step.
            line_search_batches: fresh minibatches on which step sizes are judged.

        Cost: 5/3 gradients a minibatch (full), (grid + 1)/3 + 1 a line-search minibatch.

        Raises:
            UserError: no minibatch.
        """
        if not batches or not line_search_batches:
            raise UserError(
                "a Gauss-Newton step needs at least one minibatch for the solve and one for the search"
            )
        settings = self.settings
        theta = self.partition.vector(self.objective.model)
        if not settings.warm_start:
            self._start_inner(theta)
        losses, norm = self._solve(theta, batches)
        solution = self.partition.flatten(self.inner)
        direction = solution - theta
        solved = math.isfinite(losses[-1]) and bool(torch.isfinite(direction).all())
        if not solved:
            direction = torch.zeros_like(theta)
        grid = self.grid if solved else ()
        found = search(self.objective, self.partition, theta, direction, line_search_batches, grid)
        move = found.step_size * direction
        named = self.partition.unflatten
        expected = predicted_decrease(
            self.objective, line_search_batches, named(theta), named(move), model=settings.model
        )
        self.partition.assign(self.objective.model, theta + move)
        if not found.step_size:
            # The inner solution leads nowhere: the next step must not start from it.
            self._start_inner(theta)
        self.outer += 1
        if not math.isfinite(found.start):
            outcome = "diverged: the loss is not finite"
        elif not solved:
            outcome = "rejected: the inner solve is not finite; a lower learning rate helps"
        else:
            outcome = "accepted" if found.step_size else "rejected: no step size lowers the loss"
        solving = PRODUCT_COST * len(batches) * len(self.groups)
        searching = (FORWARD_COST * (len(grid) + 1) + 1) * len(line_search_batches)
        return StepReport(
            outcome=outcome,
            loss=found.start,
            gradient_norm=norm,
            update_norm=float(move.norm()),
            step_size=found.step_size,
            line_search_loss=found.losses,
            predicted_decrease=expected,
            actual_decrease=found.decrease,
            inner_loss=tuple(losses),
            tokens=self.objective.tokens(batches),
            line_search_tokens=found.tokens,
            gradient_equivalents=solving + searching,
        )

    def _solve(self, theta: Tensor, batches: list[Batch]) -> tuple[list[float], float]:
        """Takes one inner step per minibatch in every group; returns the inner losses and the first norm."""
        point = self.partition.unflatten(theta)
        losses: list[float] = []
        first = math.nan
        for i, batch in enumerate(batches):
            factor = learning_rate_factor(
                self.settings.schedule,
                outer=self.outer,
                inner=i,
                outer_steps=self.settings.outer_steps,
                inner_steps=len(batches),
            )
            rate = factor * self.settings.learning_rate
            values, squares = [], 0.0
            for names, solver in zip(self.groups, self.solvers, strict=True):
                delta = {n: self.inner[n] - point[n] for n in names}
                found = local_gradient(self.objective, batch, point, delta, names, model=self.settings.model)
                values.append(found.value)
                squares += solver.step(found.gradient, rate, self.settings.clip) ** 2
            losses.append(sum(values) / len(values))
            first = math.sqrt(squares) if i == 0 else first
        return losses, first

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but theta: the clock, the inner solution and its optimizers' states."""
        return {
            "outer": self.outer,
            "inner": dict(self.inner),
            "solvers": [solver.state_dict() for solver in self.solvers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.outer = state["outer"]
        for name, value in state["inner"].items():
            self.inner[name].copy_(value)
        for solver, saved in zip(self.solvers, state["solvers"], strict=True):
            solver.load_state_dict(saved)
