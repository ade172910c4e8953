"""A curvature operator that is a given dense matrix: estimators are judged on spectra we choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Generator, Tensor

from hessprobe.curvature.operator import Blocks, CurvatureOperator
from hessprobe.problem.partition import Partition, Slot


def partition_of_sizes(sizes: Mapping[str, int]) -> Partition:
    """Returns a partition with one parameter a block, for which no model exists."""
    slots, start = [], 0
    for block, size in sizes.items():
        slots.append(Slot(name=block, shape=torch.Size([size]), block=block, start=start, stop=start + size))
        start += size
    return Partition(slots=tuple(slots), kind="custom")


class DenseOperator(CurvatureOperator):
    """A (p, p) matrix under a partition; counts the rows it was asked to multiply."""

    def __init__(self, matrix: Tensor, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(
            partition_of_sizes(sizes or {"everything": len(matrix)}), matrix.dtype, matrix.device
        )
        self.matrix = matrix
        self.products = 0

    def _apply(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        self.products += len(v)
        return self._only(rows, self._only(columns, v) @ self.matrix.T)

    def _only(self, blocks: Blocks, v: Tensor) -> Tensor:
        kept = torch.zeros_like(v)
        for block in blocks:
            kept[:, self.partition.slices[block]] = v[:, self.partition.slices[block]]
        return kept


def random_symmetric(p: int, generator: Generator) -> Tensor:
    """Returns an indefinite symmetric matrix with standard normal entries below the diagonal."""
    drawn = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return drawn.tril() + drawn.tril(-1).T


def with_spectrum(eigenvalues: Iterable[float], generator: Generator) -> Tensor:
    """Returns Q diag(eigenvalues) Q^T with a Haar-random orthogonal Q."""
    values = torch.tensor(list(eigenvalues), dtype=torch.float64)
    q, r = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    matrix = q * values @ q.T
    return (matrix + matrix.T) / 2
