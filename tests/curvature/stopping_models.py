"""Models whose reverse mode stops, or turns round, where forward mode goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

V, D = 8, 4


class Reversed(torch.autograd.Function):
    """x -> x whose backward pass turns the gradient round, and whose forward mode does not."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class Stopped(nn.Module):
    def __init__(self, stop: Callable[[Tensor], Tensor] | None, table: nn.Module | None = None) -> None:
        super().__init__()
        self.stop = stop
        self.embedding = table or nn.Embedding(V, D)
        self.layers, self.head = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)]), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        r = torch.tanh(self.layers[0](h))
        return self.head(torch.tanh(self.layers[1](h + (r if self.stop is None else self.stop(r)))))
