"""What every curvature matrix can do: be applied to k vectors at once, combined, and handed to other libraries.

All are symmetric p x p matrices over a partition's flat parameter vector; rows of a (k, p) tensor are the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.problem.partition import Partition

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

DENSE_LIMIT = 5_000
Blocks = Sequence[str]


class CurvatureOperator:
    """A symmetric p x p matrix A over the blocks of a partition, known by v -> A v."""

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> None:
        self.partition = partition
        self.dtype = dtype
        self.device = device

    @property
    def size(self) -> int:
        """p, the number of rows and columns."""
        return self.partition.size

    def apply(self, v: Tensor, *, columns: Blocks | None = None, rows: Blocks | None = None) -> Tensor:
        """Returns A applied to each row of v.

        Args:
            v: (k, p) vectors.
            columns: blocks in which v is non-zero (default all); entries of v elsewhere are not read.
            rows: blocks of the result that are wanted (default all); the others are zero, and not computed.

        Returns:
            (k, p) products.

        Raises:
            UserError: v is not (k, p) of this operator's dtype, or a block does not exist.
        """
        if v.dim() != 2 or v.shape[1] != self.size:
            raise UserError(
                f"{type(self).__name__}.apply: wanted (k, {self.size:,}) rows, got {tuple(v.shape)}"
                + (": give one vector as v[None]" if v.dim() == 1 else "")
            )
        if v.dtype != self.dtype or v.device != self.device:
            raise UserError(
                f"{type(self).__name__}.apply: wanted {self.dtype} on {self.device}, got {v.dtype} on {v.device}: "
                "convert with v.to(operator.device, operator.dtype)"
            )
        everything = self.partition.blocks
        columns = everything if columns is None else tuple(columns)
        rows = everything if rows is None else tuple(rows)
        self.partition.check(*columns, *rows)
        if v.shape[0] == 0 or not columns or not rows:
            return torch.zeros_like(v)
        return self._apply(v, columns, rows)

    def _apply(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        raise NotImplementedError

    def __sub__(self, other: CurvatureOperator) -> DifferenceOperator:
        return DifferenceOperator(self, other)

    def damped(self, damping: float) -> DampedOperator:
        """Returns A + damping I."""
        return DampedOperator(self, damping)

    def block_diagonal(self) -> GroupDiagonalOperator:
        """Returns blkdiag(A_11, ..., A_ll): the cross-layer blocks cut off. Cost: see `group_diagonal`."""
        return self.group_diagonal([(block,) for block in self.partition.blocks])

    def group_diagonal(self, groups: Sequence[Blocks]) -> GroupDiagonalOperator:
        """Returns blkdiag(A_SS) over groups S of blocks: what lies between groups is cut off.

        A block in no group has a zero row and column. Cost: a group-restricted product each; of Gauss-Newton
        (K + 6) / 3 gradients for K groups of equal work.

        Raises:
            UserError: a block that does not exist, or stands in two groups.
        """
        return GroupDiagonalOperator(self, groups)

    def _apply_groups(self, v: Tensor, groups: Sequence[tuple[Blocks, Blocks]]) -> Tensor:
        """Returns the sum over groups (columns, rows) of the products restricted to them; the rows are disjoint."""
        return over_groups(self._apply, v, groups, self.partition)

    def to_dense(self) -> Tensor:
        """Returns the (p, p) matrix. Cost: p products.

        Raises:
            UserError: p is above 5,000.
        """
        if self.size > DENSE_LIMIT:
            raise UserError(
                f"to_dense() needs p x p memory; this operator has p = {self.size:,} (limit {DENSE_LIMIT:,}). "
                "Use an estimator (block_norms, hutchinson_trace, lanczos), or partition a smaller model."
            )
        return self.apply(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def to_scipy(self) -> LinearOperator:
        """Returns a scipy LinearOperator in float64, for eigsh, LOBPCG, cg and the like."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(columns: Any) -> Any:
            v = torch.as_tensor(columns.T.copy(), dtype=self.dtype, device=self.device)
            return self.apply(v).T.double().cpu().numpy()

        def matvec(column: Any) -> Any:
            return matmat(column.reshape(-1, 1))[:, 0]

        shape = (self.size, self.size)
        return LinearOperator(dtype="float64", shape=shape, matvec=matvec, matmat=matmat, rmatvec=matvec)  # pyright: ignore[reportCallIssue]

    def to_curvlinops(self) -> Any:
        """Returns a curvlinops PyTorchLinearOperator on the flat vector, for its estimators and inverses."""
        from hessprobe.curvature.interop import as_curvlinops

        return as_curvlinops(self)


def over_groups(
    apply: Callable[[Tensor, Blocks, Blocks], Tensor],
    v: Tensor,
    groups: Sequence[tuple[Blocks, Blocks]],
    partition: Partition,
) -> Tensor:
    """Returns the sum over groups (columns, rows) of apply(v, columns, rows); the rows are disjoint."""
    product = torch.zeros_like(v)
    for columns, rows in groups:
        part = apply(v, columns, rows)
        for block in rows:
            where = partition.slices[block]
            product[:, where] = part[:, where]
    return product


class DifferenceOperator(CurvatureOperator):
    """A - B on the same vectors: with A = H and B = G the residual R."""

    def __init__(self, minuend: CurvatureOperator, subtrahend: CurvatureOperator) -> None:
        if minuend.partition != subtrahend.partition:
            raise UserError(
                "A - B: the two operators have different partitions; build both from one Partition"
            )
        super().__init__(minuend.partition, minuend.dtype, minuend.device)
        self.minuend = minuend
        self.subtrahend = subtrahend

    def _apply(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        return self.minuend._apply(v, columns, rows) - self.subtrahend._apply(v, columns, rows)


class DampedOperator(CurvatureOperator):
    """A + damping I."""

    def __init__(self, operator: CurvatureOperator, damping: float) -> None:
        super().__init__(operator.partition, operator.dtype, operator.device)
        self.operator = operator
        self.damping = damping

    def _apply(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        product = self.operator._apply(v, columns, rows)
        for block in set(columns) & set(rows):
            where = self.partition.slices[block]
            product[:, where] += self.damping * v[:, where]
        return product


class GroupDiagonalOperator(CurvatureOperator):
    """blkdiag(A_SS) over groups S; a group's product computes no tangents and no gradients outside it."""

    def __init__(self, operator: CurvatureOperator, groups: Sequence[Blocks]) -> None:
        super().__init__(operator.partition, operator.dtype, operator.device)
        self.operator = operator
        self.groups = tuple(tuple(group) for group in groups)
        named = [block for group in self.groups for block in group]
        self.partition.check(*named)
        twice = sorted({block for block in named if named.count(block) > 1})
        if twice:
            raise UserError(f"groups: {', '.join(twice)} named more than once; a block belongs to one group")

    def _apply(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        parts = [
            (tuple(b for b in group if b in columns), tuple(b for b in group if b in rows))
            for group in self.groups
        ]
        parts = [(own, wanted) for own, wanted in parts if own and wanted]
        return self.operator._apply_groups(v, parts) if parts else torch.zeros_like(v)
