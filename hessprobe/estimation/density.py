"""Spectral densities by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019).

Ritz values and weights of a Lanczos run from a random start v integrate every polynomial of degree up to 2 m - 1 exactly
against v's own spectral measure, whose expectation over v is the density of all eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.cost import rows_at_once
from hessprobe.curvature.model_operator import DEFAULT_MEMORY
from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.estimation.lanczos import lanczos_runs
from hessprobe.estimation.sampling import rademacher


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """Point masses that stand for a matrix's spectrum, a set for each of k random starts.

    Attributes:
        nodes: (k, m) eigenvalues, ascending; NaN beyond a Krylov space that became invariant before m steps.
        weights: (k, m) shares of all eigenvalues, each row summing to 1; NaN where the node is.
        residuals: (k, m) an eigenvalue lies this near the node.
        leading: (n,) unit Ritz vector of the largest node of all, on the block or the whole vector.
        products: with the matrix, that it took.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    leading: Tensor
    products: int

    def extreme(self, largest: bool = True) -> tuple[float, float]:
        """Returns the largest (or smallest) node of all starts, and its residual."""
        live = torch.where(self.nodes.isnan(), -torch.inf if largest else torch.inf, self.nodes).flatten()
        at = int(live.argmax() if largest else live.argmin())
        return float(live[at]), float(self.residuals.flatten()[at])

    def mass_below(self, value: float) -> Tensor:
        """Returns (k,) shares of eigenvalues below a value, one from each start."""
        return torch.where(self.nodes < value, self.weights, 0.0).sum(1)

    def smoothed(self, at: Tensor, width: float) -> Tensor:
        """Returns (k, len(at)) densities: the nodes blurred by a Gaussian of standard deviation `width`."""
        distance = (at.to(self.nodes) - self.nodes[:, :, None]) / width
        bells = torch.exp(-0.5 * distance.square()) / (width * (2 * torch.pi) ** 0.5)
        return (self.weights[:, :, None] * bells).nansum(1)


def spectral_density(
    operator: CurvatureOperator,
    steps: int,
    probes: int,
    *,
    generator: torch.Generator,
    block: str | None = None,
    memory: int = DEFAULT_MEMORY,
) -> SpectralDensity:
    """Returns the spectral density of A, or of one diagonal block of it.

    Args:
        operator: a symmetric operator, indefinite ones included.
        steps: Lanczos steps m from each start; resolution grows with them.
        probes: random starts k, whose spread is the density's error.
        generator: where the starts' random signs come from.
        block: restricts to A_bb.
        memory: bytes for Krylov spaces; starts go together as long as theirs fit, and one always does.

    Cost: `steps` x `probes` products; memory `steps` vectors for each start that goes along.

    Raises:
        UserError: steps or probes below 1, or an unknown block.
        FloatingPointError: a product that is not finite.
    """
    if probes < 1 or steps < 1:
        raise UserError(f"spectral_density: steps and probes must be at least 1, got {steps} and {probes}")
    if block is not None:
        operator.partition.check(block)
    n = operator.size if block is None else operator.partition.sizes[block]
    starts = rademacher(probes, n, generator=generator, dtype=operator.dtype, device=operator.device)
    together = starts_at_once(probes, steps, n * operator.dtype.itemsize, memory)
    measures: list[tuple[Tensor, Tensor, Tensor]] = []
    largest, leading = -torch.inf, starts[0]
    for part in starts.split(together):
        for run in lanczos_runs(operator, steps, starts=part, block=block):
            measures.append((run.ritz_values, run.weights, run.residuals))
            if float(run.ritz_values[-1]) > largest:
                largest, leading = float(run.ritz_values[-1]), run.ritz_vector(-1)
    nodes, weights, residuals = (_padded(rows, steps) for rows in zip(*measures, strict=True))
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        leading=leading,
        products=sum(len(values) for values, _, _ in measures),
    )


def starts_at_once(probes: int, steps: int, vector_bytes: int, memory: int) -> int:
    """Returns how many Lanczos runs of that many steps fit in the memory together, at least one."""
    return rows_at_once(probes, memory, steps * vector_bytes)


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Returns the rows as one tensor, NaN where a row is short."""
    found = torch.full((len(rows), length), torch.nan, dtype=torch.float64)
    for into, row in zip(found, rows, strict=True):
        into[: len(row)] = row
    return found
