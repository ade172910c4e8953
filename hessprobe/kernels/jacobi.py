"""lambda_max((D + mu)^-1 (G + mu)), D the block diagonal of G, by exact algebra on the sketches' kernels.

In coordinates of the blocks' sketches, R_i = K_i^1/2, both are l m x l m, however many parameters there are.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

DENSE_SKETCHES = 512  # block-sketch pairs up to which an eigenvalue is found by dense algebra


def coordinates_of(kernel: Tensor) -> Tensor:
    """Returns each block's sketches in coordinates of its own, K_i^1/2 (l, m, m), a sketch a column."""
    values, vectors = torch.linalg.eigh(kernel)
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT


def radius_of(built: Tensor, judged: Tensor, damping: float, *, direction_only: bool) -> float:
    """Returns the radius with D from one set of sketches and G from another.

    Args:
        built, judged: coordinates (l, m, n) times the roots of the sketches' weights, so that G_ij = F_i F_j^T.
        direction_only: find the top direction with D and G of `built`, and judge both along it with `judged`.
    """
    own, basis = torch.linalg.eigh(built @ built.mT)
    damped = own.clamp_min(0) + damping
    root = (basis * damped.rsqrt()[:, None, :]) @ basis.mT  # (D_i + mu)^-1/2
    radius, top = _largest_eigenpair(damping * root @ root, root @ (built if direction_only else judged))
    if not direction_only:
        return radius
    x = torch.einsum("imk,ik->im", root, top)
    seen = torch.einsum("imn,im->in", judged, x)
    ridge = damping * x.square().sum()
    return float((seen.sum(0).square().sum() + ridge) / (seen.square().sum() + ridge))


def _largest_eigenpair(diagonal: Tensor, factor: Tensor) -> tuple[float, Tensor]:
    """Returns the largest eigenvalue of blkdiag(diagonal) + F F^T and its eigenvector (l, m).

    Args:
        diagonal: (l, m, m) symmetric blocks.
        factor: (l, m, n), F's rows by block.
    """
    layers, m, _ = diagonal.shape
    tall = factor.flatten(0, 1)
    if layers * m <= DENSE_SKETCHES:
        values, vectors = torch.linalg.eigh(torch.block_diag(*diagonal) + tall @ tall.mT)
        return float(values[-1]), vectors[:, -1].view(layers, m)

    def product(x: Any) -> Any:
        v = torch.as_tensor(x, dtype=diagonal.dtype)
        own = torch.einsum("imn,in->im", diagonal, v.view(layers, m)).flatten()
        return (own + tall @ (tall.mT @ v.flatten())).numpy()

    # From ones: scipy would draw its start vector from numpy's global generator.
    size = layers * m
    operator = LinearOperator((size, size), matvec=product, dtype="float64")  # pyright: ignore[reportCallIssue]
    values, vectors = eigsh(operator, k=1, which="LA", v0=torch.ones(size, dtype=diagonal.dtype).numpy())
    return float(values[0]), torch.as_tensor(vectors[:, 0]).view(layers, m)
