"""Solves (A_SS + mu) x_S = b_S for several dampings mu at once, and for any groups S of blocks in one loop.

The Krylov space of A_SS and b_S is that of every A_SS + mu: one Lanczos recurrence a group serves all dampings, each with
conjugate gradients' own iterates, by its own elimination of T + mu (Frommer 2003; Frommer, Maass 1999). Unlike shifted
recurrences from one damping to the others, it tells of each whether A_SS + mu is positive definite.
Full Gauss-Newton is one group of all blocks, layerwise one group a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.optimization.conjugate_gradient import CONVERGED, INDEFINITE, NOT_FINITE


@dataclass(frozen=True, kw_only=True)
class DampedSolutions:
    """What the solver found for each damping, and whether to believe it.

    Attributes:
        x: (s, p) solutions, one for each damping; finite whatever the outcome, zero in blocks of no group.
        outcome: (s,) as in conjugate_gradient.Solution: the worst over groups.
        iterations: (s,) products until every group was done; those for `residual` are not counted.
        residual: (s,) |A x + mu x - b| / |b| over all groups together, from products with x; 0 where b = 0.
        products: the equivalent of that many products with all of A were spent, in all: a group of a third of the
            parameters that went on alone counts as a third. Those for `residual` are counted.
    """

    x: Tensor
    outcome: tuple[str, ...]
    iterations: tuple[int, ...]
    residual: Tensor
    products: float


def damped_solves(
    operator: CurvatureOperator,
    b: Tensor,
    dampings: Sequence[float],
    *,
    groups: Sequence[Sequence[str]] | None = None,
    tolerance: float = 1e-4,
    iterations: int = 200,
) -> DampedSolutions:
    """Returns x with (A_SS + mu) x_S = b_S for every group S and damping mu.

    Args:
        operator: A, symmetric; with Gauss-Newton `G.linearised(memory)`, products cost least.
        b: (p,) right-hand side.
        dampings: mu, each 0 or more; in any order.
        groups: of blocks, solved apart; default: one of all blocks.
        tolerance: of |A x + mu x - b| / |b| in each group, judged by the recurrence.
        iterations: at most this many products of a group.

    Cost: as many products of one row with the groups' diagonal blocks as the slowest damping takes, and one more for
    each damping; groups that are done take no part. Memory: 2 vectors a damping and 4 more.

    Raises:
        UserError: b of another shape; a damping below 0 or none at all; groups that overlap; a tolerance or a number of
            iterations that is not positive.
    """
    if b.shape != (operator.size,):
        raise UserError(f"damped solves: wanted a right-hand side ({operator.size:,},), got {tuple(b.shape)}")
    if not dampings or not all(0 <= mu < float("inf") for mu in dampings):
        raise UserError(f"damped solves: wanted dampings of 0 or more, got {list(dampings)}")
    if not tolerance > 0 or iterations < 1:
        raise UserError(
            f"damped solves: tolerance and iterations must be positive, got {tolerance} and {iterations}"
        )
    groups = [operator.partition.blocks] if groups is None else groups
    operator.group_diagonal(groups)  # checks them
    state = _Lanczos(operator, b, groups, dampings, tolerance)
    while state.open_groups and state.done < iterations:
        state.advance()
    return state.solutions(b)


class _Lanczos:
    """One Lanczos recurrence a group, and the elimination of every damping's tridiagonal matrix beside it.

    Scalars are (group, damping) float64 on the CPU. With T = tridiag(beta, alpha, beta) in the basis v, the pivots of
    T + mu give x += p / pivot and the residual's signed norm sigma; p and v are conjugate gradients' directions and
    residuals up to scale.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        b: Tensor,
        groups: Sequence[Sequence[str]],
        dampings: Sequence[float],
        tolerance: float,
    ) -> None:
        self.operator, self.groups, self.dampings = operator, [tuple(group) for group in groups], dampings
        self.tolerance, self.done, self.products = tolerance, 0, 0.0
        slices = operator.partition.slices
        self._places = [[slices[block] for block in group] for group in self.groups]
        self._sizes = [sum(where.stop - where.start for where in places) for places in self._places]
        self._mu = torch.tensor(list(dampings), dtype=torch.float64)
        shape = (len(groups), len(dampings))
        self._norm = self._dots(b, b).sqrt()
        finite = torch.isfinite(self._norm)
        self._bad = ~finite[:, None].expand(shape).clone()
        self._indefinite = torch.zeros(shape, dtype=torch.bool)
        self._active = ((self._norm > 0) & finite)[:, None].expand(shape).clone()
        self._iterations = torch.zeros(shape, dtype=torch.int64)
        self._beta = torch.zeros(len(groups), dtype=torch.float64)
        self._sigma = self._norm[:, None].expand(shape).clone()
        self._omega = torch.zeros(shape, dtype=torch.float64)  # beta^2 / pivot, of the step before
        self._v = self._scaled(b, torch.where(self._active.any(1), 1 / self._norm, 0.0))
        self._before = torch.zeros_like(b)
        self.x = b.new_zeros(len(dampings), len(b))
        self._p = self._scaled(b, self._active.any(1).double()).expand_as(self.x).clone()

    @property
    def open_groups(self) -> list[tuple[str, ...]]:
        """The groups in which some damping is not done."""
        return [
            group for group, still in zip(self.groups, self._active.any(1).tolist(), strict=True) if still
        ]

    def advance(self) -> None:
        """Takes one product, a step of the recurrence, and a step of every open damping."""
        product = self._product(self._v, self.open_groups)
        self.done += 1
        alpha = self._dots(self._v, product)
        product = product - self._scaled(self._v, alpha) - self._scaled(self._before, self._beta)
        beta = self._dots(product, product).sqrt()
        finite = torch.isfinite(alpha) & torch.isfinite(beta)
        self._bad |= self._active & ~finite[:, None]
        pivot = alpha[:, None] + self._mu - self._omega
        self._indefinite |= self._active & finite[:, None] & ~(pivot > 0)
        self._active &= finite[:, None] & (pivot > 0)
        step = torch.where(self._active, 1 / pivot, 0.0)
        self._before = self._v
        self._v = self._scaled(product, torch.where(finite & (beta > 0), 1 / beta, 0.0))
        self._beta = torch.where(finite, beta, 0.0)
        ratio = self._beta[:, None] * step
        self._sigma = torch.where(self._active, -self._sigma * ratio, self._sigma)
        self._omega = torch.where(self._active, self._beta[:, None] * ratio, self._omega)
        self._iterations += self._active
        for i, (x, p) in enumerate(zip(self.x, self._p, strict=True)):
            x += self._scaled(p, step[:, i])
            fresh = self._scaled(self._v, self._sigma[:, i])
            p.copy_(fresh + self._scaled(p, ratio[:, i].square()))
        self._active &= self._sigma.abs() > self.tolerance * self._norm[:, None]

    def solutions(self, b: Tensor) -> DampedSolutions:
        target = self._scaled(b, torch.where(torch.isfinite(self._norm), 1.0, 0.0))
        square = self._dots(target, target).sum()
        residuals = torch.zeros(len(self.dampings), dtype=torch.float64)
        for i, (mu, x) in enumerate(zip(self.dampings, self.x, strict=True)):
            if square > 0:
                left = (
                    self._product(x, self.groups) + mu * self._scaled(x, torch.ones_like(self._norm)) - target
                )
                residuals[i] = (self._dots(left, left).sum() / square).sqrt()
        return DampedSolutions(
            x=self.x,
            outcome=tuple(self._outcome(i) for i in range(len(self.dampings))),
            iterations=tuple(self._iterations.amax(0).tolist()),
            residual=residuals,
            products=self.products,
        )

    def _outcome(self, i: int) -> str:
        if bool(self._bad[:, i].any()):
            return NOT_FINITE
        if bool(self._indefinite[:, i].any()):
            return INDEFINITE
        return f"reached {self.done} iterations" if bool(self._active[:, i].any()) else CONVERGED

    def _product(self, v: Tensor, groups: Sequence[tuple[str, ...]]) -> Tensor:
        sizes = zip(self.groups, self._sizes, strict=True)
        self.products += sum(size for group, size in sizes if group in groups) / sum(self._sizes)
        return self.operator.group_diagonal(groups).apply(v[None])[0]

    def _dots(self, u: Tensor, v: Tensor) -> Tensor:
        """Returns u.v in each group (g,), on the CPU."""
        parts = [
            torch.stack([u[where].double() @ v[where].double() for where in places]).sum()
            for places in self._places
        ]
        return torch.stack(parts).cpu()

    def _scaled(self, v: Tensor, factors: Tensor) -> Tensor:
        """Returns each group's part of v times its factor; zero outside the groups."""
        found = torch.zeros_like(v)
        for places, factor in zip(self._places, factors.tolist(), strict=True):
            if factor:  # what is not finite is never multiplied by zero
                for where in places:
                    found[where] = factor * v[where]
        return found
