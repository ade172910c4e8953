"""First-order training steps on the same outer batch as Gauss-Newton, for comparison and for its warm-up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hessprobe.curvature.diagonal import sampled_diagonal
from hessprobe.curvature.kronecker_factors import KINDS
from hessprobe.errors import RunFailed, UserError, unknown_name
from hessprobe.machine.processes import ProcessLost, together
from hessprobe.machine.seeds import generator_of
from hessprobe.optimization.inner_solver import REFRESH, SOLVERS, FirstOrder, hidden_matrices, refresh_of
from hessprobe.optimization.kfac import DAMPING, KFAC, TRUST
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.schedule import learning_rate_factor
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.schema.optimizers import ENTRIES

BASELINES = (*SOLVERS, *KINDS)
BASELINE_REFRESH = {**REFRESH, **dict.fromkeys(KINDS, ENTRIES["kfac"].refresh or 1)}


class FirstOrderOptimizer:
    """One of BASELINES on the whole outer batch (one step), or on each of its minibatches (one step each).

    Args:
        objective: model and loss; `step` moves the model's parameters in place.
        partition: which parameters move.
        solver: one of SOLVERS (see FirstOrder: SOAP's first step only builds its basis), or "kfac" or "ekfac" (see KFAC:
            learning rate 1 is its natural step).
        learning_rate, clip, weight_decay: as in torch.optim.
        schedule: "global-cosine" or "constant".
        outer_steps: the length of the run, for the cosine.
        accumulate: one step on the mean gradient of all minibatches; otherwise a step a minibatch.
        learning_rate_warmup: outer steps over which the learning rate rises in a line, before the schedule starts.
        refresh: steps between two preconditioners (defaults: 1; sophia 10), for those that have one.
        damping, trust: of kfac and ekfac, where damping defaults to 0.01.
        curvature_minibatches: how many of the outer batch's minibatches sophia and kfac estimate curvature from;
            default: all.
        seed: of the labels that sophia and kfac draw, together with the step's number.

    Raises:
        UserError: an unknown solver; refresh or damping out of range or for a solver that has none; a negative warm-up.
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
        learning_rate_warmup: int = 0,
        refresh: int | None = None,
        damping: float | None = None,
        trust: float | None = TRUST,
        curvature_minibatches: int | None = None,
        seed: int = 0,
    ) -> None:
        if solver not in BASELINES:
            raise unknown_name("optimizer", solver, BASELINES)
        if learning_rate_warmup < 0:
            raise UserError(f"learning_rate_warmup must be 0 or more steps, got {learning_rate_warmup}")
        if curvature_minibatches is not None and curvature_minibatches < 1:
            raise UserError(f"curvature_minibatches must be at least 1, got {curvature_minibatches}")
        self.objective = objective
        self.partition = partition
        self.learning_rate = learning_rate
        self.clip = clip
        self.schedule = schedule
        self.outer_steps = outer_steps
        self.accumulate = accumulate
        self.learning_rate_warmup = learning_rate_warmup
        self.refresh = refresh_of(solver, refresh, BASELINE_REFRESH)
        self.curvature_minibatches = curvature_minibatches
        self.seed = seed
        self.outer, self.taken = 0, 0
        if solver in SOLVERS:
            if damping is not None:
                raise UserError(f"damping {damping}: {solver} has none; it is kfac's and ekfac's")
            named = {n: p for n, p in objective.model.named_parameters() if n in partition.names}
            hidden = hidden_matrices(objective.model)
            self.solver: FirstOrder | KFAC = FirstOrder(
                solver, named, hidden, weight_decay=weight_decay, refresh=refresh
            )
        else:
            self.solver = KFAC(
                objective,
                partition,
                kind=solver,
                damping=DAMPING if damping is None else damping,
                trust=trust,
                weight_decay=weight_decay,
            )

    @together(lambda self, *_, **__: self.objective.processes)
    def step(self, batches: list[Batch], line_search_batches: list[Batch] | None = None) -> StepReport:
        """Takes one outer step; line-search data is not read.

        Cost: a gradient a minibatch; every `refresh` steps one more for sophia, two to three more for kfac.

        Raises:
            UserError: no minibatch.
            PeerFailed, ProcessLost: of several processes another one failed, or died (see Processes.together).
        """
        if not batches:
            raise UserError("an optimizer step needs at least one minibatch")
        before = self.partition.vector(self.objective.model)
        listed = self.objective.micro_batches(batches)
        groups = [listed] if self.accumulate else [listed[i : i + 1] for i in range(len(listed))]
        losses, norm, cost, outcome = [], math.nan, float(len(listed)), "accepted"
        for i, group in enumerate(groups):
            loss, gradient = self.objective.gradient(group, self.partition)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                outcome = "diverged: the loss is not finite"
                break
            try:
                found, extra = self._take(group, gradient, self._rate(i, len(groups)))
            except ProcessLost:
                raise
            except RunFailed as error:
                outcome = f"diverged: {error}"
                break
            norm = found if i == 0 else norm
            cost += extra
        self.outer += 1
        after = self.partition.vector(self.objective.model)
        if outcome == "accepted" and not bool(torch.isfinite(after).all()):
            outcome = "diverged: the step is not finite"
        return StepReport(
            outcome=outcome,
            loss=losses[0],
            gradient_norm=norm,
            update_norm=float((after - before).norm()),
            inner_loss=tuple(losses),
            tokens=listed.tokens,
            gradient_equivalents=cost,
        )

    def _rate(self, inner: int, inner_steps: int) -> float:
        """Returns the learning rate of one step: first the warm-up's line, then the schedule from its own beginning."""
        warmup = self.learning_rate_warmup
        if self.outer < warmup:
            done, steps = self.outer * inner_steps + inner, warmup * inner_steps
            return self.learning_rate * (done + 1) / (steps + 1)
        return self.learning_rate * learning_rate_factor(
            self.schedule,
            outer=self.outer - warmup,
            inner=inner,
            outer_steps=max(self.outer_steps - warmup, 1),
            inner_steps=inner_steps,
        )

    def _take(self, batches: MicroBatches, gradient: Tensor, rate: float) -> tuple[float, float]:
        """Takes one step; returns the gradient's norm and the gradient-equivalents spent on curvature."""
        gradients, cost, diagonal = self.partition.unflatten(gradient), 0.0, None
        sampled = batches[: self.curvature_minibatches]
        due = self.taken % self.refresh == 0
        if isinstance(self.solver, KFAC):
            cost = self.solver.refresh(sampled, self._generator(gradient.device)) if due else 0.0
            norm = self.solver.step(gradients, rate, self.clip)
        else:
            if due and ENTRIES[self.solver.solver].estimate:
                generator = self._generator(gradient.device)
                estimate = sampled_diagonal(self.objective, sampled, self.partition, generator=generator)
                diagonal, cost = self.partition.unflatten(estimate), float(len(sampled))
            norm = self.solver.step(gradients, rate, self.clip, diagonal=diagonal)
        self.taken += 1
        return norm, cost

    def _generator(self, device: torch.device) -> torch.Generator:
        """Returns a generator that depends on the seed and the number of steps taken alone."""
        return generator_of(self.seed, "labels", self.taken, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock and the optimizer's state, for a checkpoint."""
        return {"outer": self.outer, "taken": self.taken, "solver": self.solver.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.outer, self.taken = state["outer"], state["taken"]
        self.solver.load_state_dict(state["solver"])
