"""A Kronecker-factored stand-in for G: each parameter's block is L (x) R diag(e) L^T (x) R^T, L and R orthogonal.

K-FAC and EK-FAC (curvature/kronecker.py) differ in their eigenvalues e alone, so one object serves both; damping is
added to the eigenvalues, exactly, and may change from one use to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from hessprobe.errors import UserError

KINDS = ("kfac", "ekfac")


@dataclass(frozen=True, kw_only=True)
class KroneckerBlock:
    """One parameter's block: eigenvectors `left` (o, o) and `right` (i, i), eigenvalues (o, i); a bias has no right."""

    left: Tensor
    right: Tensor | None
    eigenvalues: Tensor

    def apply(self, x: Tensor, power: float, damping: float) -> Tensor:
        """Returns (block + damping)^power x for x of the parameter's shape, (..., o, i) or (..., o)."""
        factor = (self.eigenvalues + damping) ** power
        if self.right is None:
            return (x @ self.left * factor) @ self.left.mT
        return self.left @ (self.left.mT @ x @ self.right * factor) @ self.right.mT


@dataclass(frozen=True, kw_only=True)
class KroneckerFactors:
    """A Kronecker-factored, block-diagonal stand-in for G on some of the parameters.

    Attributes:
        blocks: by parameter name.
        gradient_equivalents: what building it cost, by operation count: passes over the data and sums of outer
            products; eigenvectors, which do not grow with the data, are not counted.
    """

    blocks: Mapping[str, KroneckerBlock]
    gradient_equivalents: float

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it covers."""
        return tuple(self.blocks)

    def apply(
        self, tensors: Mapping[str, Tensor], *, power: float = 1.0, damping: float = 0.0
    ) -> dict[str, Tensor]:
        """Returns (K + damping)^power applied to tensors (..., *shape) by name; names it does not cover are left out.

        Power -1/2 makes the preconditioned M^{-1/2} G M^{-1/2}; damping is added to the eigenvalues, exactly.
        """
        covered = {name: x for name, x in tensors.items() if name in self.blocks}
        return {name: self.blocks[name].apply(x, power, damping) for name, x in covered.items()}

    def apply_inverse(self, tensors: Mapping[str, Tensor], *, damping: float) -> dict[str, Tensor]:
        """Returns (K + damping I)^{-1} applied to tensors by name, such as a gradient.

        Raises:
            UserError: damping not above 0; K is singular as soon as a layer has fewer rows of data than columns.
        """
        check_damping(damping)
        return self.apply(tensors, power=-1.0, damping=damping)

    def traces(self) -> dict[str, float]:
        """Returns the trace of every parameter's block."""
        return {name: float(block.eigenvalues.sum()) for name, block in self.blocks.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor | None]]:
        """Returns its tensors, for a checkpoint."""
        return {
            name: {f.name: getattr(block, f.name) for f in fields(block)}
            for name, block in self.blocks.items()
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> KroneckerFactors:
        """Returns what `state_dict` was taken of; its cost is already paid."""
        blocks = {name: KroneckerBlock(**tensors) for name, tensors in state.items()}
        return cls(blocks=blocks, gradient_equivalents=0.0)


def check_damping(damping: float) -> None:
    """Raises a UserError where K-FAC's damping is not positive."""
    if not damping > 0:
        raise UserError(
            f"damping {damping}: K-FAC's factors are singular in general, so it must be above 0; 0.001 to 0.1 are usual"
        )
