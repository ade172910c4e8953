"""Layers whose second derivatives are left out: all a linearisation needs is z = f(x) and f'(x), as constants.

Torch differentiates the reverse pass of GELU, SiLU and LayerNorm in x too, in tens of full-size tensors, where J v and
J^T w are linear maps with what is known from the forward pass: a product with f'(x), one fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode


class _Elementwise(Function):
    """x -> f(x), with the slopes f'(x) given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The empty tensor: where activation checkpointing recomputes the layer in its usual form, which saves x alone,
        # torch then notices that the two do not match, instead of taking x for f'(x).
        ctx.save_for_backward(slope, slope.new_empty(0))
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0], None, None


class _Projected(Function):
    """g -> (g - mean g - y mean(g y)) / s with y = (x - mean x) / s: LayerNorm's Jacobian, its own transpose."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, shape: list[int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, mean, inverse)
        ctx.shape = shape
        wanted = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, inverse, None, None, wanted
        )[0]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _projected(w, *ctx.saved_tensors, ctx.shape), None, None, None, None


def _projected(*given: Any) -> Tensor:
    found = _Projected.apply(*given)
    assert isinstance(found, Tensor)
    return found


class _Normed(Function):
    """x -> (x - mean x) / s, without scale and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], epsilon: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, inverse = torch.native_layer_norm(x, shape, None, None, epsilon)
        ctx.save_for_backward(x.detach(), mean, inverse)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, inverse = ctx.saved_tensors
        return _projected(g, x.detach(), mean, inverse, ctx.shape), None, None


class first_order(TorchFunctionMode):
    """Within it, gelu, silu (out of place) and layer_norm have values and first derivatives, but no second ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.gelu and len(args) == 1 and not set(kwargs) - {"approximate"}:
            x = args[0].detach()
            slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, **kwargs)
            return _Elementwise.apply(args[0], torch.ops.aten.gelu(x, **kwargs), slope)
        if func is F.silu and len(args) == 1 and not kwargs.get("inplace", False):
            x = args[0].detach()
            slope = torch.ops.aten.silu_backward(torch.ones_like(x), x)
            return _Elementwise.apply(args[0], torch.ops.aten.silu(x), slope)
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = _Normed.apply(input, list(normalized_shape), eps)
    assert isinstance(y, Tensor)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
