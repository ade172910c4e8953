"""The truth that operators are judged by: loss, gradient, G and H as dense float64 matrices.

Built from definitions and reverse-mode autodiff alone (torch.autograd.functional, double backward), with no
code of hessprobe: G = (1/N) sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n, and H differentiates the loss twice.
torch.func.hessian is avoided on purpose: it is silently wrong for affine LayerNorm in torch 2.13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian as double_backward
from torch.autograd.functional import jacobian as reverse_rows
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Loss, gradient (p,), Gauss-Newton (p, p) and Hessian (p, p), in the order of `names`."""

    names: tuple[str, ...]
    shapes: Mapping[str, torch.Size]
    tokens: int
    loss: Tensor
    gradient: Tensor
    gauss_newton: Tensor
    hessian: Tensor

    @property
    def residual(self) -> Tensor:
        """R = H - G."""
        return self.hessian - self.gauss_newton

    def in_order(self, names: Sequence[str]) -> Dense:
        """Returns the same truth with its parameters in another order."""
        if sorted(names) != sorted(self.names):
            raise ValueError(f"order must name {sorted(self.names)}, got {sorted(names)}")
        order = torch.cat([torch.arange(self._start(name), self._start(name) + self.shapes[name].numel())
                           for name in names])  # fmt: skip
        return Dense(
            names=tuple(names),
            shapes=self.shapes,
            tokens=self.tokens,
            loss=self.loss,
            gradient=self.gradient[order],
            gauss_newton=self.gauss_newton[order][:, order],
            hessian=self.hessian[order][:, order],
        )

    def _start(self, name: str) -> int:
        return sum(self.shapes[earlier].numel() for earlier in self.names[: self.names.index(name)])


def dense(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    theta: Mapping[str, Tensor] | None = None,
    ignore_index: int = -100,
) -> Dense:
    """Returns the dense truth for the trainable parameters of `model` on (inputs, targets) micro-batches.

    Dropout is off. Micro-batches are weighted by how many of their targets are valid.
    """
    model = copy.deepcopy(model).eval()
    at = {n: q.detach().clone() for n, q in model.named_parameters() if q.requires_grad} | dict(theta or {})
    names, shapes = tuple(at), {name: value.shape for name, value in at.items()}

    def valid_outputs(flat: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pieces = flat.split([shapes[name].numel() for name in names])
        parameters = {name: piece.view(shapes[name]) for name, piece in zip(names, pieces, strict=True)}
        outputs = torch.func.functional_call(model, parameters, (inputs,))
        outputs = outputs.reshape(-1, outputs.shape[-1])
        if targets.is_floating_point():
            return outputs, targets.reshape(outputs.shape)
        labels = targets.reshape(-1)
        return outputs[labels != ignore_index], labels[labels != ignore_index]

    theta0 = torch.cat([at[name].reshape(-1) for name in names]).double()
    tokens = sum(len(valid_outputs(theta0, *batch)[1]) for batch in batches)

    def mean_loss(flat: Tensor) -> Tensor:
        sums = [token_losses(loss, *valid_outputs(flat, *batch)).sum() for batch in batches]
        return torch.stack(sums).sum() / tokens

    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gauss_newton = torch.zeros(len(theta0), len(theta0), dtype=torch.float64)
        for batch in batches:
            outputs, targets = valid_outputs(theta0, *batch)
            if len(targets) == 0:
                continue
            rows = reverse_rows(lambda flat, batch=batch: valid_outputs(flat, *batch)[0], theta0)
            curvature = logit_hessians(loss, outputs, targets)
            gauss_newton += torch.einsum("ncp,ncd,ndq->pq", rows, curvature, rows) / tokens
        return Dense(
            names=names,
            shapes=shapes,
            tokens=tokens,
            loss=mean_loss(theta0),
            gradient=reverse_rows(mean_loss, theta0),  # type: ignore[arg-type]
            gauss_newton=gauss_newton,
            # vectorize=True sends all rows through one double backward at once; still reverse over reverse.
            hessian=double_backward(mean_loss, theta0, vectorize=True),  # type: ignore[arg-type]
        )


def token_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of every token (n,), written out from its definition."""
    if callable(loss):
        return loss(outputs, targets)
    if loss == "cross_entropy":
        return torch.logsumexp(outputs, -1) - outputs[torch.arange(len(targets)), targets]
    if loss == "squared_error":
        return 0.5 * (outputs - targets).square().sum(-1)
    raise ValueError(loss)


def logit_hessians(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the second derivative of every token's loss in its outputs, dense (n, c, c)."""
    n, c = outputs.shape
    if callable(loss):
        one = [lambda z, y=targets[i : i + 1]: token_losses(loss, z[None], y)[0] for i in range(n)]
        return torch.stack([double_backward(f, z) for f, z in zip(one, outputs, strict=True)])  # type: ignore[misc]
    if loss == "squared_error":
        return torch.eye(c, dtype=outputs.dtype).expand(n, c, c)
    p = outputs.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def linear_regression_curvature(x: Tensor, outputs: int) -> Tensor:
    """Returns G = H of 1/2 |W x - y|^2, averaged over rows: I (x) X^T X / n, for W (outputs, features)."""
    return torch.kron(torch.eye(outputs, dtype=x.dtype), x.T @ x / len(x))


def softmax_regression_curvature(x: Tensor, weight: Tensor) -> Tensor:
    """Returns G = H of softmax regression z = W x: mean of (diag(p) - p p^T) (x) x x^T (Boehning 1992)."""
    p = (x @ weight.T).softmax(-1)
    logit = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    terms = [torch.kron(a, torch.outer(row, row)) for a, row in zip(logit, x, strict=True)]
    return torch.stack(terms).mean(0)


def block_fro2(matrix: Tensor, slices: Sequence[slice]) -> Tensor:
    """Returns the squared Frobenius norm of every block A_ij, (l, l)."""
    return torch.stack([torch.stack([matrix[i, j].square().sum() for j in slices]) for i in slices])


def coupling(matrix: Tensor, slices: Sequence[slice]) -> Tensor:
    """Returns fro2[i, j] / sqrt(fro2[i, i] fro2[j, j]), (l, l)."""
    fro2 = block_fro2(matrix, slices)
    diagonal = fro2.diagonal().sqrt()
    return fro2 / diagonal[:, None] / diagonal


def block_diagonal(matrix: Tensor, slices: Sequence[slice]) -> Tensor:
    """Returns the matrix with everything between different blocks set to zero."""
    kept = torch.zeros_like(matrix)
    for block in slices:
        kept[block, block] = matrix[block, block]
    return kept


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest deviation over the largest wanted entry."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    return float((got - wanted).abs().max() / wanted.abs().max())
