"""Solves A x = b for a curvature matrix known by its action.

Conjugate gradients build one Krylov space per right-hand side (Hestenes, Stiefel 1952), or one shared by all (block CG:
O'Leary 1980, in Dubrulle's QR form, ETNA 12, 2001).

Layerwise, full and everything between are one solver: A restricted to a group of blocks is `blocks=group`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError

CONVERGED = "converged"
INDEFINITE = "indefinite: negative curvature"
NOT_FINITE = "not finite"
Preconditioner = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a linear solver found, and whether to believe it.

    Attributes:
        x: (k, p) solutions; finite whatever the outcome, and zero outside the blocks asked for.
        outcome: "converged", "reached N iterations", "indefinite: negative curvature" (x is the iterate before
            it was met) or "not finite" (the operator or b gave NaN or infinity); the worst over right-hand sides.
        iterations: products with A, whatever k; the last product, for `residual`, is not counted.
        residual: (k,) |A x - b| / |b|, from a product with x itself, not from the recurrence; 0 where b = 0.
    """

    x: Tensor
    outcome: str
    iterations: int
    residual: Tensor

    @property
    def converged(self) -> bool:
        """Whether every right-hand side reached the tolerance."""
        return self.outcome == CONVERGED


def conjugate_gradient(
    operator: CurvatureOperator,
    b: Tensor,
    *,
    tolerance: float = 1e-4,
    iterations: int = 200,
    blocks: Sequence[str] | None = None,
    preconditioner: Preconditioner | None = None,
) -> Solution:
    """Returns x with A x = b, each row of b by conjugate gradients of its own; products are taken together.

    Args:
        operator: A, symmetric positive definite: for Gauss-Newton, `G.damped(mu)`.
        b: (k, p) right-hand sides.
        tolerance: of |A x - b| / |b|, judged by the recurrence; at most about 1e-6 is in reach of float32.
        iterations: at most this many products.
        blocks: solve A_SS x_S = b_S for the blocks S alone; b elsewhere is not read.
        preconditioner: (k, p) -> (k, p), an approximation of A^-1, symmetric positive definite.

    Cost: `iterations` + 1 products of k rows.

    Raises:
        UserError: b of another shape than (k, p), or a tolerance or a number of iterations that is not positive.
    """
    b, norm = _prepared(operator, b, tolerance, iterations, blocks)
    apply = _restricted(operator, blocks)
    precondition = preconditioner or (lambda r: r)
    x, r = torch.zeros_like(b), b.clone()
    z = _only(operator, blocks, precondition(r))
    direction, rho = z, _dots(r, z)
    active = norm > 0
    bad, indefinite, done = ~torch.isfinite(norm), torch.zeros_like(active), 0
    active &= ~bad
    while done < iterations and bool(active.any()):
        product = apply(direction)
        done += 1
        curvature = _dots(direction, product)
        finite = torch.isfinite(curvature) & torch.isfinite(rho)
        bad |= active & ~finite
        indefinite |= active & finite & (curvature <= 0)
        active &= finite & (curvature > 0)
        # Rows that stopped get a step of zero: where() keeps their NaN out of x.
        step = torch.where(active, rho / curvature, 0.0)[:, None]
        x = torch.where(active[:, None], x + step * direction, x)
        r = torch.where(active[:, None], r - step * product, r)
        active &= r.norm(dim=1) > tolerance * norm
        z = _only(operator, blocks, precondition(r))
        after = _dots(r, z)
        direction = torch.where(active[:, None], z + (after / rho)[:, None] * direction, 0.0)
        rho = after
    return _solution(apply, x, b, norm, done, bool(bad.any()), bool(indefinite.any()), bool(active.any()))


def block_conjugate_gradient(
    operator: CurvatureOperator,
    b: Tensor,
    *,
    tolerance: float = 1e-4,
    iterations: int = 200,
    blocks: Sequence[str] | None = None,
) -> Solution:
    """Returns x with A x = b for all rows of b from one shared Krylov space: fewer products when k is large.

    Args, cost and errors as `conjugate_gradient`; rows may depend on each other linearly, or be equal.
    Negative curvature anywhere in the space searched stops all rows.
    """
    b, norm = _prepared(operator, b, tolerance, iterations, blocks)
    apply = _restricted(operator, blocks)
    x = torch.zeros_like(b)
    live = (norm > 0) & torch.isfinite(norm)
    bad, indefinite, done = bool((~torch.isfinite(norm)).any()), False, 0
    open_rows = bool(live.any())
    if open_rows:
        # Columns of unit length: right-hand sides of very different size would lose the small ones in one QR.
        q, c = torch.linalg.qr((b[live] / norm[live, None]).T)
        search, found = q, torch.zeros_like(q)
        while done < iterations and open_rows:
            product = apply(search.T.contiguous()).T
            done += 1
            gram = search.T @ product
            gram = (gram + gram.T) / 2
            if not bool(torch.isfinite(gram).all()):
                bad = True
                break
            if float(torch.linalg.eigvalsh(gram)[0]) <= 0:
                indefinite = True
                break
            step = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            found = found + search @ (step @ c)
            q, change = torch.linalg.qr(q - product @ step)
            search = q + search @ change.T
            c = change @ c  # the residual is q c, q orthonormal
            open_rows = bool((c.norm(dim=0) > tolerance).any())
        x[live] = found.T * norm[live, None]
    return _solution(apply, x, b, norm, done, bad, indefinite, open_rows)


def _prepared(
    operator: CurvatureOperator, b: Tensor, tolerance: float, iterations: int, blocks: Sequence[str] | None
) -> tuple[Tensor, Tensor]:
    """Returns b with zeros outside the blocks, and its rows' norms."""
    if b.dim() != 2 or b.shape[1] != operator.size:
        raise UserError(
            f"conjugate gradients: wanted right-hand sides (k, {operator.size:,}), got {tuple(b.shape)}"
            + (": give one as b[None]" if b.dim() == 1 else "")
        )
    if not tolerance > 0 or iterations < 1:
        raise UserError(
            f"conjugate gradients: tolerance and iterations must be positive, got {tolerance} and {iterations}"
        )
    b = _only(operator, blocks, b)
    return b, b.norm(dim=1)


def _only(operator: CurvatureOperator, blocks: Sequence[str] | None, v: Tensor) -> Tensor:
    if blocks is None:
        return v
    operator.partition.check(*blocks)
    kept = torch.zeros_like(v)
    for block in blocks:
        kept[:, operator.partition.slices[block]] = v[:, operator.partition.slices[block]]
    return kept


def _restricted(operator: CurvatureOperator, blocks: Sequence[str] | None) -> Callable[[Tensor], Tensor]:
    return lambda v: operator.apply(v, columns=blocks, rows=blocks)


def _dots(u: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.vecdot(u, v)


def _solution(
    apply: Callable[[Tensor], Tensor],
    x: Tensor,
    b: Tensor,
    norm: Tensor,
    done: int,
    bad: bool,
    indefinite: bool,
    unfinished: bool,
) -> Solution:
    outcome = (
        NOT_FINITE
        if bad
        else INDEFINITE
        if indefinite
        else f"reached {done} iterations"
        if unfinished
        else CONVERGED
    )
    live = norm > 0
    residual = torch.zeros_like(norm)
    if bool(live.any()):
        residual = torch.where(
            live, (apply(x) - b).norm(dim=1) / norm.clamp_min(torch.finfo(b.dtype).tiny), 0.0
        )
    return Solution(x=x, outcome=outcome, iterations=done, residual=residual)
