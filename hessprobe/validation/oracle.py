"""What figures are judged by: products and block norms of G and H in float64 by plain double backward, on the CPU.

Nothing of hessprobe's engines is in here: G v = (1/N) J^T (p u - p (p.u)), u = J v, by the derivative of J^T w in w.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.problem.partition import Partition


class Oracle:
    """A model's cross-entropy in float64 on micro-batches, and its curvature.

    Args:
        model: float32, on any device; a copy in float64 on the CPU is taken, dropout off.
        batches: (inputs, targets); targets of -100 carry no loss.
        partition: the order of the parameters in a vector.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], partition: Partition
    ) -> None:
        self.model = copy.deepcopy(model).cpu().double().eval()
        self.partition = partition
        self.batches = [(x.cpu(), y.cpu()) for x, y in batches]
        own = dict(self.model.named_parameters())
        self.parameters = [own[name] for name in partition.names]
        self.tokens = sum(int((y != -100).sum()) for _, y in self.batches)

    def hessian(self, v: Tensor) -> Tensor:
        """Returns H v (p,)."""
        found = torch.zeros(self.partition.size, dtype=torch.float64)
        direction = self._pieces(v)
        for x, y in self.batches:
            with sdpa_kernel(SDPBackend.MATH):
                loss = F.cross_entropy(
                    self.model(x).flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100
                )
            first = torch.autograd.grad(loss, self.parameters, create_graph=True)
            slope = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
            assert isinstance(slope, Tensor)
            found += self._flat(torch.autograd.grad(slope, self.parameters, allow_unused=True))
        return found / self.tokens

    def gauss_newton(self, v: Tensor) -> Tensor:
        """Returns G v (p,)."""
        found = torch.zeros(self.partition.size, dtype=torch.float64)
        for x, y in self.batches:
            z = self._logits(x, y)
            dual = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(z, self.parameters, dual, create_graph=True, allow_unused=True)
            slope = sum((g * d).sum() for g, d in zip(pulled, self._pieces(v), strict=True) if g is not None)
            assert isinstance(slope, Tensor)
            (u,) = torch.autograd.grad(slope, dual, retain_graph=True)
            p = z.detach().softmax(-1)
            curved = p * u - p * (p * u).sum(-1, keepdim=True)
            found += self._flat(torch.autograd.grad(z, self.parameters, curved, allow_unused=True))
        return found / self.tokens

    def block_norms(self) -> Tensor:
        """Returns ||G_ij||_F^2 (l, l), exact: from the rows of J, one backward pass an output."""
        rows = []
        for x, y in self.batches:
            z = self._logits(x, y)
            # diag(p) - p p^T = R R^T with R = (I - p 1^T) diag(sqrt p), a root for each token.
            p = z.detach().softmax(-1)
            root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
            units = torch.zeros(z.shape[0] * z.shape[1], *z.shape, dtype=torch.float64)
            for n in range(z.shape[0]):
                for c in range(z.shape[1]):
                    units[n * z.shape[1] + c, n] = root[n, :, c]
            pulled = torch.autograd.grad(z, self.parameters, units, is_grads_batched=True, allow_unused=True)
            flat = [
                torch.zeros(len(units), p.numel(), dtype=torch.float64) if g is None else g.flatten(1)
                for g, p in zip(pulled, self.parameters, strict=True)
            ]
            rows.append(torch.cat(flat, 1))
        a = torch.cat(rows) / self.tokens**0.5  # G = a^T a
        slices = list(self.partition.slices.values())
        norms = torch.empty(len(slices), len(slices), dtype=torch.float64)
        for i, left in enumerate(slices):
            for j, right in enumerate(slices):
                norms[i, j] = (a[:, left].T @ a[:, right]).square().sum()
        return norms

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the logits (n, c) of the tokens with a target."""
        with sdpa_kernel(SDPBackend.MATH):
            z = self.model(x).flatten(0, 1)
        return z[y.flatten() != -100]

    def _pieces(self, v: Tensor) -> list[Tensor]:
        named = self.partition.unflatten(v.detach().cpu().double())
        return [named[name] for name in self.partition.names]

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        pieces = [
            torch.zeros_like(p) if g is None else g for g, p in zip(gradients, self.parameters, strict=True)
        ]
        return torch.cat([piece.detach().reshape(-1) for piece in pieces])
