"""Activations that differentiate twice in a few operations: f, f' by torch's fused kernels, f'' in closed form.

Torch's own second derivative of GELU is written out in some twenty full-size tensors, and SiLU's backward pass has
no forward mode at all. By these functions both have, at the cost of one factor f''; problem/operation_rules.py puts
them in torch's places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_ROOT = math.sqrt(2 / math.pi)
_CUBE = 0.044715  # of GELU's tanh form (Hendrycks and Gimpel 2016)


def gelu_second(x: Tensor) -> Tensor:
    """Returns f''(x) of x Phi(x): phi(x) (2 - x^2)."""
    square = x.square()
    density = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return density.mul_(2 - square)


def tanh_gelu_second(x: Tensor) -> Tensor:
    """Returns f''(x) of x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    square = x.square()
    t = (square * _CUBE).add_(1).mul_(x).mul_(_ROOT).tanh_()
    first = (square * (3 * _CUBE)).add_(1).mul_(_ROOT)  # u'
    # (1 - t^2) (u' + x u'' / 2 - x t u'^2) with u'' = 6 * 0.044715 sqrt(2 / pi) x
    inner = first + square.mul_(3 * _CUBE * _ROOT)
    inner.sub_(first.square_().mul_(t).mul_(x))
    return inner.mul_(t.square_().neg_().add_(1))


def silu_second(x: Tensor) -> Tensor:
    """Returns f''(x) of x s(x), s the logistic function: s (1 - s) (2 + x (1 - 2 s))."""
    s = x.sigmoid()
    inner = (s * -2).add_(1).mul_(x).add_(2)
    return inner.mul_(s).mul_(1 - s)


def _twice_differentiable(
    value: Callable[[Tensor], Tensor],
    backward_kernel: Callable[[Tensor, Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
) -> type[Function]:
    """Returns an autograd function of an elementwise f, given f, (g, x) -> g f'(x), and f''."""

    class Slope(Function):
        """g, x -> g f'(x)."""

        generate_vmap_rule = True

        @staticmethod
        def forward(g: Tensor, x: Tensor) -> Tensor:
            return backward_kernel(g, x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, g_tangent: Tensor | None, x_tangent: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            g, x = ctx.saved_tensors
            along = None if x_tangent is None else second(x) * g * x_tangent
            if g_tangent is None:
                return torch.zeros_like(g) if along is None else along
            slope = backward_kernel(g_tangent, x)
            return slope if along is None else along.add_(slope)

        @staticmethod
        def backward(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            g, x = ctx.saved_tensors
            return Slope.apply(w, x), second(x) * g * w

    class Value(Function):
        """x -> f(x)."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return value(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return Slope.apply(tangent, ctx.saved_tensors[0])

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return Slope.apply(g, ctx.saved_tensors[0])

    return Value


def _tanh_gelu(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu(x, approximate="tanh")


def _tanh_gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh")


GELU = {
    "none": _twice_differentiable(torch.ops.aten.gelu, torch.ops.aten.gelu_backward, gelu_second),
    "tanh": _twice_differentiable(_tanh_gelu, _tanh_gelu_backward, tanh_gelu_second),
}
SILU = _twice_differentiable(torch.ops.aten.silu, torch.ops.aten.silu_backward, silu_second)
