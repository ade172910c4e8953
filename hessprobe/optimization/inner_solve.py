"""Solves Gauss-Newton's inner problem: by first-order steps on minibatches, or by conjugate gradients on all of them.

Every group of blocks is solved at the same theta on the same data, with the other groups at theta.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessprobe.curvature.cost import dual_pass
from hessprobe.curvature.gauss_newton import GaussNewton as Curvature
from hessprobe.optimization.conjugate_gradient import INDEFINITE, NOT_FINITE, conjugate_gradient
from hessprobe.optimization.group_models import LocalModels
from hessprobe.optimization.inner_problem import Group
from hessprobe.optimization.inner_solver import FirstOrder
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition

DIVERGED = "diverged: the residual grew"
RETRIES = 2
GROWTH = 10.0  # of |residual| / |b|; it need not fall at every iteration, but does not come back from here


@dataclass(frozen=True, kw_only=True)
class InnerSolution:
    """What an inner solve found.

    Attributes:
        delta: (p,) displacement from theta.
        losses: value of the damped model (nats per token; mean over groups) at each inner step, each on its own
            minibatch; for conjugate gradients where they start and where they end, on the whole batch.
        gradient_norm: of the first inner step's gradient over all groups; of the loss's, for conjugate gradients.
        iterations: inner steps, or conjugate gradient iterations of the group that took most.
        residual: |g + (G + mu) delta| / |g|, every group with its own block of G; NaN where it is not known.
        cost: gradients of one minibatch, by operation count.
        trouble: why the solve is not to be trusted; "" where it is.
        retried: " after 1 retry at ...", "" for a first attempt.
    """

    delta: Tensor
    losses: tuple[float, ...]
    gradient_norm: float
    iterations: int
    cost: float
    residual: float = math.nan
    trouble: str = ""
    retried: str = ""

    @property
    def finite(self) -> bool:
        """Whether there is a step at all, if a doubtful one."""
        return self.trouble != NOT_FINITE

    @property
    def history(self) -> str:
        """What an outcome adds on how the solution came about; "" where nothing is to be said."""
        return self.retried + (
            f" (conjugate gradients: {self.trouble})" if self.trouble and self.finite else ""
        )


def until_sound(solve: Callable[[int], InnerSolution], setting: Callable[[int], str]) -> InnerSolution:
    """Returns the first of at most three solutions that can be trusted, else the last; its cost is that of all.

    Args:
        solve: attempt (0, 1, 2) -> solution.
        setting: attempt -> at what it was made, in words.
    """
    found = solve(0)
    for attempt in range(1, RETRIES + 1):
        if not found.trouble:
            break
        again = solve(attempt)
        count = "1 retry" if attempt == 1 else f"{attempt} retries"
        found = replace(again, cost=found.cost + again.cost, retried=f" after {count} at {setting(attempt)}")
    return found


def first_order_solution(
    local: LocalModels,
    batches: MicroBatches,
    partition: Partition,
    theta: Tensor,
    inner: Mapping[str, Tensor],
    solvers: Sequence[FirstOrder],
    rates: Sequence[float],
    clip: float | None,
) -> InnerSolution:
    """Takes an inner step for each learning rate, over the minibatches in turn; stops at the first NaN or infinity.

    Args:
        inner: the inner solution by name; the solvers, one for each group of `local`, move it in place.

    Cost: (K + 6) / 3 gradients a step for K groups, 5/3 for one.
    """
    point = partition.unflatten(theta)
    minibatches = [batches[i : i + 1] for i in range(len(batches))]
    losses: list[float] = []
    first = math.nan
    finite = True
    for i, rate in enumerate(rates):
        delta = {name: x - point[name] for name, x in inner.items()}
        found = local.gradients(minibatches[i % len(batches)], point, delta)
        norms = [solver.step(f.gradient, rate, clip) for solver, f in zip(solvers, found, strict=True)]
        losses.append(sum(f.value for f in found) / len(found))
        norm = math.sqrt(sum(n**2 for n in norms))
        first = norm if i == 0 else first
        finite = math.isfinite(losses[-1]) and math.isfinite(norm)
        if not finite:
            break
    step = partition.flatten(inner) - theta
    finite = finite and bool(torch.isfinite(step).all())
    return InnerSolution(
        delta=step,
        losses=tuple(losses),
        gradient_norm=first,
        iterations=len(losses),
        cost=local.cost * len(losses),
        trouble="" if finite else NOT_FINITE,
    )


def conjugate_gradient_solution(
    objective: Objective,
    batches: MicroBatches,
    partition: Partition,
    groups: Sequence[Group],
    theta: Tensor,
    start: Tensor,
    *,
    damping: float,
    iterations: int,
    tolerance: float,
) -> InnerSolution:
    """Solves (G_SS + damping I) delta_S = -g_S for every group S of blocks, on all minibatches together.

    Args:
        start: (p,) where to start; a group for which the model is worse there than at 0 starts at 0.

    Cost: a gradient, and 5 (1 + 1 / K) / 6 gradients a product for K groups of equal work, each a minibatch.
    """
    loss, gradient = objective.gradient(batches, partition, partition.unflatten(theta))
    operator = Curvature(objective, batches, partition, parameters=theta).damped(damping)
    delta, values, squares, most, products = torch.zeros_like(theta), [], 0.0, 0, 0
    troubles: list[str] = []
    for blocks in groups:
        g, at = _inside(partition, gradient, blocks), _inside(partition, start, blocks)
        b, before = -g, 0.0
        if bool(at.any()):
            curved = operator.apply(at[None], columns=blocks, rows=blocks)[0]
            products += 1
            gain = float(g @ at + 0.5 * at @ curved)
            if gain < 0:
                b, before = -(g + curved), gain
            else:
                at = torch.zeros_like(at)
        size = float(b.norm())
        within = tolerance * float(g.norm()) / size if 0 < size < math.inf else tolerance
        solution = conjugate_gradient(
            operator, b[None], tolerance=max(within, sys.float_info.min), iterations=iterations, blocks=blocks
        )
        x, relative = solution.x[0], float(solution.residual[0])
        products += solution.iterations + 1
        most = max(most, solution.iterations)
        delta += at + x
        squares += (relative * size) ** 2
        # A conjugate gradient iterate is orthogonal to its residual, so the model fell by b.x / 2.
        values.append((before, before - 0.5 * float(b @ x)))
        if solution.outcome in (INDEFINITE, NOT_FINITE):
            troubles.append(solution.outcome)
        elif not relative < GROWTH:
            troubles.append(DIVERGED)
    norm = float(gradient.norm())
    finite = math.isfinite(float(loss)) and bool(torch.isfinite(delta).all()) and math.isfinite(norm)
    return InnerSolution(
        delta=delta,
        losses=tuple(float(loss) + sum(column) / len(groups) for column in zip(*values, strict=True)),
        gradient_norm=norm,
        iterations=most,
        cost=len(batches) * (1 + products * dual_pass(len(groups))),
        residual=math.sqrt(squares) / norm if norm else math.nan,
        trouble=NOT_FINITE if not finite or NOT_FINITE in troubles else next(iter(troubles), ""),
    )


def _inside(partition: Partition, vector: Tensor, blocks: Group) -> Tensor:
    """Returns the vector with zeros outside the blocks."""
    kept = torch.zeros_like(vector)
    for block in blocks:
        kept[partition.slices[block]] = vector[partition.slices[block]]
    return kept
