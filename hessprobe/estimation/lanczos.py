"""Extreme eigenvalues by Lanczos: A Q = Q T + r e^T, Ritz values of T, and how far each may be off.

Full reorthogonalisation, twice (Parlett 1998, chapter 13), so that no eigenvalue is found twice by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.estimation.sampling import rademacher


@dataclass(frozen=True, kw_only=True)
class LanczosResult:
    """A Krylov space and its Ritz values.

    Attributes:
        alphas: (m,) diagonal of T.
        betas: (m - 1,) off-diagonal of T.
        remainder: the norm of r, zero where the Krylov space is invariant (then every Ritz value is exact).
        basis: (m, n) orthonormal rows Q, on the chosen block or the whole vector.
        ritz_values: (m,) eigenvalues of T, ascending.
        residuals: (m,) ||A x - ritz x|| of each Ritz vector x: an eigenvalue of A lies that near.
        weights: (m,) squared first components of T's eigenvectors, which sum to 1 (quadrature weights).
    """

    alphas: Tensor
    betas: Tensor
    remainder: float
    basis: Tensor
    ritz_values: Tensor
    residuals: Tensor
    weights: Tensor


def lanczos(
    operator: CurvatureOperator,
    steps: int,
    *,
    generator: torch.Generator,
    block: str | None = None,
    start: Tensor | None = None,
) -> LanczosResult:
    """Returns up to `steps` Ritz values of A, or of one diagonal block of it.

    Args:
        operator: a symmetric operator.
        steps: products to spend; fewer where the Krylov space becomes invariant first.
        generator: where the start vector's random signs come from.
        block: restricts to A_bb.
        start: a start vector (n,) instead of random signs.

    Cost: `steps` products; memory `steps` vectors.

    Raises:
        UserError: `steps` below 1 or an unknown block.
    """
    if steps < 1:
        raise UserError(f"lanczos: steps must be at least 1, got {steps}")
    blocks = None
    where = slice(0, operator.size)
    if block is not None:
        operator.partition.check(block)
        blocks, where = (block,), operator.partition.slices[block]
    n = where.stop - where.start
    steps = min(steps, n)

    def product(q: Tensor) -> Tensor:
        v = torch.zeros(1, operator.size, dtype=operator.dtype, device=operator.device)
        v[0, where] = q
        return operator.apply(v, columns=blocks, rows=blocks)[0, where]

    if start is None:
        start = rademacher(1, n, generator=generator, dtype=operator.dtype, device=operator.device)[0]
    basis = torch.zeros(steps, n, dtype=operator.dtype, device=operator.device)
    basis[0] = start / start.norm()
    alphas: list[float] = []
    betas: list[float] = []
    scale, beta = 0.0, 0.0
    for m in range(steps):
        w = product(basis[m])
        alphas.append(float(basis[m] @ w))
        known = basis[: m + 1]
        for _ in range(2):
            w = w - known.T @ (known @ w)
        beta = float(w.norm())
        scale = max(scale, abs(alphas[-1]), beta)
        # Below this the remainder is rounding: the space is invariant, and a further vector would be noise.
        invariant = beta <= scale * n**0.5 * torch.finfo(operator.dtype).eps * 10
        if invariant or m == steps - 1:
            beta = 0.0 if invariant else beta
            break
        betas.append(beta)
        basis[m + 1] = w / beta
    m = len(alphas)
    t = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.tensor(betas, dtype=torch.float64)
        t = t + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(t)
    return LanczosResult(
        alphas=torch.tensor(alphas, dtype=torch.float64),
        betas=torch.tensor(betas, dtype=torch.float64),
        remainder=beta,
        basis=basis[:m],
        ritz_values=values,
        residuals=(beta * vectors[-1]).abs(),
        weights=vectors[0].square(),
    )
