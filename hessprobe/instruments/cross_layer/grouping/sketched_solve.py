"""One damped Gauss-Newton solve in the space of sketches: with all sequences, and with each of them left out.

d_S = -(1/mu)(g_S - W_S^T (K_SS + z)^-1 W_S g_S) (Woodbury). z < mu, because a solve in a sketched G acts like an exact
one at the larger damping kappa(z) = 1 / sum_k u_k / (lambda_k + z) (Silverstein 1995; generalised cross-validation):
each group of blocks takes the z with kappa(z) = mu.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class SketchHalf:
    """Sketches that one solve is built from: some rounds of half of the sequences, in order of sequence."""

    index: np.ndarray  # (n r,) into all sketches
    root: np.ndarray  # (n r,) square roots of their weights in G
    rounds: int

    @cached_property
    def own(self) -> np.ndarray:
        """(n, r) places of each sequence's sketches."""
        return np.arange(len(self.index)).reshape(-1, self.rounds)

    def spectrum(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns eigenvalues (m,), none below zero, and eigenvectors (m, m) of the weighted Gram matrix."""
        scaled = kernel[np.ix_(self.index, self.index)] * self.root[:, None] * self.root
        values, vectors = np.linalg.eigh(scaled)
        return np.maximum(values, 0.0), vectors


def coefficients(
    part: SketchHalf,
    kernel: np.ndarray,
    alignment: np.ndarray,
    *,
    damping: float,
    corrected: bool,
    left_out: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Returns y (1 + n, m) with d_S = -(g_S - W_S^T y)/mu, for all sequences and with each left out, and z.

    Args:
        kernel, alignment: of the group of blocks, over all sketches.
        corrected: False takes z = mu.
        left_out: shares of the tokens (n,) of the part's sequences, or (0,) for the solve with all of them alone.
    """
    values, vectors = part.spectrum(kernel)
    z = inner_damping(values, vectors, part.root**2, damping) if corrected else damping
    rotated = vectors.T @ (part.root * alignment[part.index])
    # Left out, the others' weights grow by 1 / (1 - share): the same as damping less by that.
    inverse = 1 / (values + z * np.concatenate([[1.0], 1 - left_out])[:, None])  # (1 + n, m)
    y = (inverse * rotated) @ vectors.T
    if len(left_out):
        # Rows and columns D leave a system solved with P = (K + z)^-1: y - P[:, D] P[D, D]^-1 y[D].
        columns = (inverse[1:, None] * vectors[part.own]) @ vectors.T  # P[:, D] (n, r, m)
        corner = np.take_along_axis(columns, part.own[:, None, :], axis=2)  # P[D, D] (n, r, r)
        own = np.take_along_axis(y[1:], part.own, axis=1)
        y[1:] -= np.einsum("nr,nrm->nm", np.linalg.solve(corner, own[..., None])[..., 0], columns)
    return y * part.root, z


def inner_damping(values: np.ndarray, vectors: np.ndarray, weights: np.ndarray, damping: float) -> float:
    """Returns z in (0, damping] at which a sketched solve acts like an exact one at `damping`.

    1 / kappa(z) = sum_k u_k / (lambda_k + z) with u_k = sum_m c_m V_mk^2: kappa rises with z and is concave, so
    Newton's method converges from the left. Where even z = 0 acts like more than `damping`, 1e-3 damping is returned: there
    are too few sketches for that damping.

    Args:
        values, vectors: eigenvalues (m,) and eigenvectors (m, m) of the weighted Gram matrix.
        weights: c (m,), which sum to 1.
    """
    u = weights @ vectors**2
    z = floor = 1e-3 * damping
    for _ in range(50):
        inverse = 1 / (values + z)
        kappa = 1 / (u @ inverse)
        if kappa >= damping * (1 - 1e-10):
            break
        z += (damping - kappa) / (kappa**2 * (u @ inverse**2))
    return float(min(max(z, floor), damping))


def least_damping(part: SketchHalf, kernel: np.ndarray, freedom: float) -> float:
    """Returns the smallest damping at which a solve leaves that share of the sketches' degrees of freedom."""
    values, vectors = part.spectrum(kernel)
    u = part.root**2 @ vectors**2
    # The freedom sum_k u_k z / (lambda_k + z) rises with z: bisection in log z.
    low, high = -60.0, float(np.log(values[-1] + 1e-300)) + 10
    for _ in range(60):
        middle = (low + high) / 2
        z = np.exp(middle)
        low, high = (low, middle) if u @ (z / (values + z)) >= freedom else (middle, high)
    return float(np.exp(high) / freedom)
