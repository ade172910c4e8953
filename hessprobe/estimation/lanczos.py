"""Extreme eigenvalues by Lanczos: A Q = Q T + r e^T, Ritz values of T, and how far each may be off.

Full reorthogonalisation, twice (Parlett 1998, chapter 13), so that no eigenvalue is found twice by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Generator
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
        coordinates: (m, m) eigenvectors of T in its columns: Ritz vectors are `coordinates.T @ basis`.
    """

    alphas: Tensor
    betas: Tensor
    remainder: float
    basis: Tensor
    ritz_values: Tensor
    residuals: Tensor
    weights: Tensor
    coordinates: Tensor

    def ritz_vector(self, index: int) -> Tensor:
        """Returns the unit Ritz vector (n,) of `ritz_values[index]`."""
        return self.coordinates[:, index].to(self.basis) @ self.basis


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
    if start is None:
        n = _place(operator, block).stop - _place(operator, block).start
        start = rademacher(1, n, generator=generator, dtype=operator.dtype, device=operator.device)[0]
    return lanczos_runs(operator, steps, starts=start[None], block=block)[0]


def lanczos_runs(
    operator: CurvatureOperator, steps: int, *, starts: Tensor, block: str | None = None
) -> list[LanczosResult]:
    """Returns what `lanczos` returns for each start vector (k, n); their products are taken together.

    Cost: `steps` products of k rows; memory k x `steps` vectors.

    Raises:
        UserError: `steps` below 1 or an unknown block.
        FloatingPointError: a product that is not finite.
    """
    if steps < 1:
        raise UserError(f"lanczos: steps must be at least 1, got {steps}")
    where = _place(operator, block)
    blocks = None if block is None else (block,)
    runs = [_recurrence(start, steps) for start in starts]
    found: list[LanczosResult | None] = [None] * len(runs)
    asked = {i: next(run) for i, run in enumerate(runs)}
    while asked:
        v = torch.zeros(len(asked), operator.size, dtype=operator.dtype, device=operator.device)
        v[:, where] = torch.stack(list(asked.values()))
        products = operator.apply(v, columns=blocks, rows=blocks)[:, where]
        for i, product in zip(list(asked), products, strict=True):
            try:
                asked[i] = runs[i].send(product)
            except StopIteration as end:  # done, or its space is invariant: the others go on without it
                found[i] = end.value
                del asked[i]
    return [run for run in found if run is not None]


def _place(operator: CurvatureOperator, block: str | None) -> slice:
    if block is None:
        return slice(0, operator.size)
    operator.partition.check(block)
    return operator.partition.slices[block]


def _recurrence(start: Tensor, steps: int) -> Generator[Tensor, Tensor, LanczosResult]:
    """Yields vectors q, is sent A q for each, and returns the Krylov space."""
    n = len(start)
    steps = min(steps, n)
    basis = torch.zeros(steps, n, dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    alphas: list[float] = []
    betas: list[float] = []
    scale, beta = 0.0, 0.0
    for m in range(steps):
        w = yield basis[m]
        alphas.append(float(basis[m] @ w))
        known = basis[: m + 1]
        for _ in range(2):
            w = w - known.T @ (known @ w)
        beta = float(w.norm())
        if not math.isfinite(alphas[-1] + beta):
            raise FloatingPointError(f"lanczos: product {m + 1} with the matrix is not finite")
        scale = max(scale, abs(alphas[-1]), beta)
        # Below this the remainder is rounding: the space is invariant, and a further vector would be noise.
        invariant = beta <= scale * n**0.5 * torch.finfo(start.dtype).eps * 10
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
        coordinates=vectors,
    )
