"""Extreme eigenvalues of M^-1/2 A M^-1/2 from products with A and M^-1 alone: Lanczos in M's inner product.

With z = M^-1 v, the vectors v are orthonormal in v.z as M^-1/2 v are in the plain product, and A z continues them: the
recurrence of preconditioned conjugate gradients (Golub, Van Loan 2013, section 11.5), here with full reorthogonalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.estimation.sampling import rademacher


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Extreme Ritz values of M^-1/2 A M^-1/2: the largest is at most, the smallest at least the true eigenvalue.

    Attributes:
        largest, smallest: Ritz values.
        largest_residual, smallest_residual: an eigenvalue lies that near; 0 where the Krylov space is invariant.
        steps: products spent.
    """

    largest: float
    smallest: float
    largest_residual: float
    smallest_residual: float
    steps: int

    @property
    def condition(self) -> float:
        """Largest / smallest: at most the true condition number where both eigenvalues are positive."""
        return self.largest / self.smallest


def conditioning(
    operator: CurvatureOperator,
    inverse: Callable[[Tensor], Tensor],
    steps: int,
    *,
    generator: torch.Generator,
) -> Conditioning:
    """Returns the extreme Ritz values of M^-1/2 A M^-1/2 after so many Lanczos steps.

    Args:
        operator: A, symmetric.
        inverse: M^-1 on rows (k, p) -> (k, p), symmetric positive definite.
        steps: products to spend; fewer where the Krylov space becomes invariant first.
        generator: where the start vector's random signs come from.

    Cost: `steps` products with A and as many with M^-1; memory 2 `steps` vectors.

    Raises:
        UserError: fewer than 1 step, or an inverse that is not positive definite.
        FloatingPointError: a product that is not finite.
    """
    if steps < 1:
        raise UserError(f"conditioning: steps must be at least 1, got {steps}")
    n = operator.size
    v = rademacher(1, n, generator=generator, dtype=operator.dtype, device=operator.device)[0]
    z, norm = _normed(v, inverse)
    vs, zs = [v / norm], [z / norm]
    alphas: list[float] = []
    betas: list[float] = []
    scale, beta = 0.0, 0.0
    while True:
        w = operator.apply(zs[-1][None])[0]
        alphas.append(float(zs[-1] @ w))
        for _ in range(2):
            for v, z in zip(vs, zs, strict=True):
                w = w - (z @ w) * v
        z, beta = _normed(w, inverse)
        scale = max(scale, abs(alphas[-1]), beta)
        # Below this the remainder is rounding: the space is invariant, and a further vector would be noise.
        if beta <= scale * n**0.5 * torch.finfo(operator.dtype).eps * 10:
            beta = 0.0
            break
        if len(alphas) >= min(steps, n):
            break
        betas.append(beta)
        vs.append(w / beta)
        zs.append(z / beta)
    diagonal, off = (torch.tensor(x, dtype=torch.float64) for x in (alphas, betas))
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    residuals = (beta * vectors[-1]).abs()
    return Conditioning(
        largest=float(values[-1]),
        smallest=float(values[0]),
        largest_residual=float(residuals[-1]),
        smallest_residual=float(residuals[0]),
        steps=len(alphas),
    )


def _normed(v: Tensor, inverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """Returns M^-1 v and sqrt(v . M^-1 v)."""
    z = inverse(v[None])[0]
    square = float(v.double() @ z.double())
    if not math.isfinite(square):
        raise FloatingPointError("conditioning: a product with the matrix or the inverse is not finite")
    if square < 0:
        raise UserError(
            f"conditioning: the preconditioner's inverse is not positive definite (v.M^-1 v = {square:.1e}): it has no "
            "condition number"
        )
    return z, math.sqrt(square)
