"""One outer Gauss-Newton step: minimise a model of the loss around theta, then search along the way there.

ONE step = model (quadratic | prox-linear) x structure (full | layerwise | any groups of blocks) x inner solver
x line search x warm start x schedule. The structure is a list of groups solved independently at the same theta on
the same minibatches: full Gauss-Newton has one group of all blocks, layerwise one group per block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.curvature import cost as cost_of
from hessprobe.errors import UserError, unknown_name
from hessprobe.machine.processes import together
from hessprobe.optimization.group_models import LocalModels
from hessprobe.optimization.inner_problem import GaussNewtonSettings, groups_of
from hessprobe.optimization.inner_solve import (
    InnerSolution,
    conjugate_gradient_solution,
    first_order_solution,
    until_sound,
)
from hessprobe.optimization.inner_solver import FirstOrder, hidden_matrices
from hessprobe.optimization.line_search import search
from hessprobe.optimization.local_model import predicted_decrease
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.schedule import learning_rate_factors
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition, unwrapped

CUT = 4  # an inner solve that fails is done again at a learning rate cut by this, or a damping raised by it
FIRST_DAMPING = 1e-2  # what a retry takes where there was none


class GaussNewton:
    """Implements Gauss-Newton with a matrix-free inner solve: full, layerwise, or with any groups of blocks.

    At theta, minimise over the displacement delta the model of the loss (g gradient, G Gauss-Newton matrix, z outputs,
    J = dz/dtheta; means over N tokens)

        quadratic:    L + g.delta + delta.G delta / 2 + damping |delta|^2 / 2
        prox-linear:  mean loss(z + J delta) + damping |delta|^2 / 2

    by an inner step on each minibatch or by conjugate gradients on all; then theta <- theta + alpha delta, with the
    alpha of 1, 2^(-1/2), 1/2, ... that has the least true loss, or none where every one harms.

    Args:
        model: the module to train; `step` moves its parameters in place.
        objective: its loss, and how batches are taken apart; default: `Objective(model)`, cross-entropy.
        partition: the blocks: a Partition, or what `Partition.of` takes ("layer", "module", "parameter", a function).
        settings: a GaussNewtonSettings; default: the reference study's.
        options: attributes of GaussNewtonSettings by name, in place of those of `settings`: structure, model, solver,
            damping, learning_rate, schedule, clip, inner_steps, cg_iterations, cg_tolerance, line_search_grid,
            warm_start, outer_steps, predict.

    Raises:
        UserError: an unknown option, name or combination, a structure that does not fit the blocks, an objective or
            partition of another model.

    Example:
        >>> optimizer = hp.optim.GaussNewton(model, structure="layerwise", learning_rate=0.02, outer_steps=100)
        >>> for batches, fresh in loader:  # lists of minibatches (inputs, targets)
        >>>     report = optimizer.step(batches, fresh)
        >>>     print(report.outcome, report.loss, report.step_size)

    Unlike torch.optim's, it needs no `backward()` or `zero_grad()`: `step` differentiates the model itself, in eval mode.
    Source: Abreu, Vyas, Kakade, Morwani 2025 (arXiv 2510.09378), section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        /,
        objective: Objective | None = None,
        *,
        partition: Partition | str | Callable[[str], str] = "layer",
        settings: GaussNewtonSettings | None = None,
        **options: Any,
    ) -> None:
        known = [f.name for f in fields(GaussNewtonSettings)]
        for name in options:
            if name not in known:
                raise unknown_name(
                    "option of GaussNewton", name, ["objective", "partition", "settings", *known]
                )
        self.objective = Objective(model) if objective is None else objective
        if self.objective.model is not unwrapped(model):
            raise UserError("GaussNewton: the objective is of another model; make both from the same module")
        self.partition = partition if isinstance(partition, Partition) else Partition.of(model, partition)
        strangers = set(self.partition.names) - {name for name, _ in self.objective.model.named_parameters()}
        if strangers:
            raise UserError(
                f"GaussNewton: the partition is of another model: this one has no {', '.join(sorted(strangers)[:3])}"
            )
        self.settings = replace(settings or GaussNewtonSettings(), **options)
        self.blocks = groups_of(self.settings.structure, self.partition)
        groups = [
            tuple(name for block in group for name in self.partition.parameters_of(block))
            for group in self.blocks
        ]
        self.grid = self.settings.step_sizes(len(groups))
        self.local = LocalModels(
            self.objective, groups, model=self.settings.model, damping=self.settings.damping
        )
        self.outer = 0
        self._hidden = hidden_matrices(self.objective.model)
        self._start_inner(self.partition.vector(self.objective.model))

    def _start_inner(self, theta: Tensor) -> None:
        """Puts every group's inner solution at theta, with fresh optimizer states."""
        self.inner = {name: x.clone() for name, x in self.partition.unflatten(theta).items()}
        self.solvers: list[FirstOrder] = []
        if self.settings.solver != "cg":
            self.solvers = [
                FirstOrder(self.settings.solver, {n: self.inner[n] for n in names}, self._hidden)
                for names in self.local.groups
            ]

    @together(lambda self, *_, **__: self.objective.processes)
    def step(
        self, batches: Batch | list[Batch], line_search_batches: Batch | list[Batch] | None = None
    ) -> StepReport:
        """Takes one outer step: the inner solve, then the line search on fresh data; moves the model's parameters.

        Args:
            batches: the outer batch as minibatches; each serves one inner step (see GaussNewtonSettings.inner_steps).
            line_search_batches: fresh minibatches on which step sizes are judged. None takes `batches`: a biased judge,
                since the step was made to lower the loss on these.

        Returns:
            What was done. Where the inner solve meets NaN or infinity, or conjugate gradients break down, it is done
            again from theta, with fresh inner state, at a quarter of the learning rate (four times the damping), at
            most twice; then the step is rejected (or, where conjugate gradients left a finite iterate, searched along),
            and `outcome` says so.

        Cost: in gradients, 5/3 (full) or (K + 6) / 3 (K groups) an inner step, (grid + 1) / 3 + 1 a line-search
        minibatch. Memory: twice to three times a gradient's on the sequences that go through the model at once (see
        Objective.pieces), more for groups (see LocalModels).

        Raises:
            UserError: no minibatch, or none with a target.
            PeerFailed, ProcessLost: of several processes another one failed, or died (see Processes.together).
        """
        listed = self._listed(batches)
        judged = listed if line_search_batches is None else self._listed(line_search_batches)
        theta = self.partition.vector(self.objective.model)
        if not self.settings.warm_start:
            self._start_inner(theta)
        solution = until_sound(lambda attempt: self._solve(theta, listed, attempt), self._attempted)
        direction = solution.delta if solution.finite else torch.zeros_like(theta)
        grid = self.grid if solution.finite else ()
        found = search(self.objective, self.partition, theta, direction, judged, grid)
        cost = solution.cost + cost_of.line_search(len(grid)) * len(judged)
        move = found.step_size * direction
        promised = 0.0 if self.settings.predict else math.nan
        if found.step_size:
            self.partition.assign(self.objective.model, theta + move)
            if self.settings.predict:
                named = self.partition.unflatten
                promised = predicted_decrease(
                    self.objective, judged, named(theta), named(move), model=self.settings.model
                )
                cost += len(judged)
        else:
            # The inner solution leads nowhere: the next step must not start from it.
            self._start_inner(theta)
        self.outer += 1
        read = listed if self.settings.solver == "cg" else listed[: self.settings.inner_steps]
        return StepReport(
            outcome=_outcome(found.start, found.step_size, solution),
            loss=found.start,
            gradient_norm=solution.gradient_norm,
            update_norm=float(move.norm()),
            step_size=found.step_size,
            line_search_loss=found.losses,
            predicted_decrease=promised,
            actual_decrease=found.decrease,
            inner_loss=solution.losses,
            inner_iterations=solution.iterations,
            inner_residual=solution.residual,
            tokens=read.tokens,
            line_search_tokens=0 if line_search_batches is None else found.tokens,
            gradient_equivalents=cost,
        )

    def _listed(self, batches: Batch | list[Batch]) -> MicroBatches:
        """Returns the minibatches that carry a target; one without takes no part."""
        if isinstance(batches, list) and not batches:
            raise UserError(
                "a Gauss-Newton step needs at least one minibatch for the solve and one for the search"
            )
        return self.objective.micro_batches(batches).with_targets

    def _solve(self, theta: Tensor, batches: MicroBatches, attempt: int) -> InnerSolution:
        """Solves the inner problem; every attempt but the first starts at theta and goes less far."""
        settings = self.settings
        if attempt:
            self._start_inner(theta)
        if settings.solver == "cg":
            found = conjugate_gradient_solution(
                self.objective,
                batches,
                self.partition,
                self.blocks,
                theta,
                self.partition.flatten(self.inner) - theta,
                damping=self._damping(attempt),
                iterations=settings.cg_iterations,
                tolerance=settings.cg_tolerance,
            )
            if found.finite:
                for name, x in self.partition.unflatten(theta + found.delta).items():
                    self.inner[name].copy_(x)
            return found
        factors = learning_rate_factors(
            settings.course,
            outer=self.outer,
            outer_steps=settings.outer_steps or 1,
            inner_steps=settings.inner_steps or len(batches),
        )
        rates = [factor * self._rate(attempt) for factor in factors]
        return first_order_solution(
            self.local, batches, self.partition, theta, self.inner, self.solvers, rates, settings.clip
        )

    def _rate(self, attempt: int) -> float:
        return self.settings.learning_rate / CUT**attempt

    def _damping(self, attempt: int) -> float:
        mu = self.settings.damping
        return mu if attempt == 0 else mu * CUT**attempt or FIRST_DAMPING * CUT ** (attempt - 1)

    def _attempted(self, attempt: int) -> str:
        """Says at what an attempt was made: what `_solve` changes from one to the next."""
        by_cg = self.settings.solver == "cg"
        return f"damping {self._damping(attempt):g}" if by_cg else f"learning rate {self._rate(attempt):g}"

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but theta: the clock, the inner solution and its optimizers' states."""
        return {
            "outer": self.outer,
            "shared": self.local.engine == "shared",  # the two engines agree up to rounding alone
            "inner": dict(self.inner),
            "solvers": [solver.state_dict() for solver in self.solvers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; theta is the model's own state.

        Raises:
            UserError: a state of another model, structure or solver.
        """
        shapes = {name: tuple(x.shape) for name, x in self.inner.items()}
        saved = {name: tuple(x.shape) for name, x in state["inner"].items()}
        if saved != shapes or len(state["solvers"]) != len(self.solvers):
            raise UserError(
                "GaussNewton: the saved state is of another model, structure or solver: it holds "
                f"{len(saved)} parameters and {len(state['solvers'])} inner solvers, wanted {len(shapes)} and "
                f"{len(self.solvers)}"
            )
        self.outer = state["outer"]
        self.local.engine = "shared" if state["shared"] else "forward-mode"
        for name, value in state["inner"].items():
            self.inner[name].copy_(value)
        for solver, kept in zip(self.solvers, state["solvers"], strict=True):
            solver.load_state_dict(kept)


def _outcome(start: float, step_size: float, solution: InnerSolution) -> str:
    """Says what became of a step: accepted, rejected or diverged, and after how many retries."""
    if not math.isfinite(start):
        return "diverged: the loss is not finite"
    if not solution.finite:
        return f"rejected: the inner solve is not finite{solution.history}; a lower learning rate or more damping helps"
    if not step_size:
        return f"rejected: no step size lowers the loss{solution.history}"
    return f"accepted{solution.history}"
