"""Models that break the shortcuts of products: seeded, checkpointed, with functions of their own, once only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tests import models
from tests.cases import Case

Seeded = Callable[[int], torch.Generator]


class Checkpointed(nn.Module):
    """Activations of the body are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        body = checkpoint(self.body, x, use_reentrant=False)
        assert isinstance(body, Tensor)
        return self.head(body)


class Cubic(torch.autograd.Function):
    """x + x^3 with a backward of its own and no forward mode, as most custom functions are written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x**3

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangents[0] * (1 + 3 * x**2)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Cubic.apply(self.body(x)))  # type: ignore[arg-type]


AWKWARD = {"activation checkpointing": Checkpointed, "custom autograd.Function": Custom}


def awkward(kind: type[nn.Module], generator: Seeded) -> Case:
    draws = generator(13)
    batches = [(models.real(draws, n, 4), models.labels(draws, 4, n)) for n in (6, 3)]
    return Case.on(models.Problem(models.redraw(kind(), draws), batches, "cross_entropy"))


class Scatter(nn.Module):
    """Writes in place into memory of its own, which vmap over tangents does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(len(x), 6, dtype=x.dtype)
        padded[:, :] = self.body(x).tanh()
        return self.head(padded)


class Branching(nn.Module):
    """Looks at its activations to decide what to do, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        return self.head(hidden * 2 if float(hidden.detach().sum()) > 0 else hidden**2)


class Unused(nn.Module):
    """Has a layer that its outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler, self.body, self.head = nn.Linear(4, 2), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class UnusedCustom(Custom):
    """The same without forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(4, 2)


STUBBORN = {
    "in-place writes": Scatter,
    "branches on data": Branching,
    "unused": Unused,
    "unused custom": UnusedCustom,
}


class OnceOnly(torch.autograd.Function):
    """A function whose gradient cannot be differentiated again, as hand-written fused kernels often are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return cotangents[0] * (1 - x.tanh() ** 2)


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(OnceOnly.apply(self.body(x)))  # type: ignore[arg-type]
