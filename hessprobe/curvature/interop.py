"""Our operators in other libraries' clothes (curvlinops is imported only when asked for)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from curvlinops._torch_base import PyTorchLinearOperator  # the documented base for own operators
from torch import Tensor

if TYPE_CHECKING:
    from hessprobe.curvature.operator import CurvatureOperator


class CurvlinopsView(PyTorchLinearOperator):
    """A curvature operator as curvlinops takes it: one tensor (p,), or columns (p, k)."""

    SELF_ADJOINT = True

    def __init__(self, operator: CurvatureOperator) -> None:
        super().__init__([(operator.size,)], [(operator.size,)])
        self.operator = operator

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        (columns,) = X
        return [self.operator.apply(columns.T.contiguous()).T]

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device


def as_curvlinops(operator: CurvatureOperator) -> CurvlinopsView:
    """Returns the operator as a curvlinops PyTorchLinearOperator."""
    return CurvlinopsView(operator)
