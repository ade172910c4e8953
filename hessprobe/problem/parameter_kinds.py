"""Which parameters can be measured: real floating-point tensors of one piece, those that the measurement was made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.swapping import CHANGED, parameter_named

SHOWN = 5  # names in a message


def check_kinds(model: nn.Module) -> None:
    """Raises where curvature in a model's parameters makes no sense or cannot be had, and names them.

    Integers beside trainable parameters (packed, quantised weights as plain tensors) are constants, and no obstacle.

    Raises:
        UserError: trainable parameters that are complex, or any of a tensor class with arithmetic of its own.
    """
    complex_ones, strange = [], {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            complex_ones.append(name)
        if (kind := _own_class(parameter)) is not None:
            strange.setdefault(kind, []).append(name)
    if complex_ones:
        raise UserError(
            f"complex parameters: {_named(complex_ones)}. Curvature is measured in real parameters: keep real and imaginary "
            "part as one real parameter (..., 2) and use torch.view_as_complex in forward(), or freeze them with "
            "requires_grad_(False)"
        )
    for kind, names in strange.items():
        raise UserError(
            f"parameters of class {kind}: {_named(names)}. A quantised or otherwise packed tensor has no derivatives to "
            "measure: measure the model before it is quantised, or with its weights dequantised to float32"
        )


def present(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, nn.Parameter]:
    """Returns the parameters of these names.

    Raises:
        UserError: one is gone, or has another shape.
    """
    found: dict[str, nn.Parameter] = {}
    with without_rules():
        for name, shape in shapes.items():
            there = parameter_named(model, name)
            if there is None or there.shape != shape:
                now = "gone" if there is None else f"{tuple(there.shape)} now"
                raise UserError(f"{CHANGED} ({name!r}, {tuple(shape)}, is {now})")
            found[name] = there
    return found


def _own_class(parameter: Tensor) -> str | None:
    """Returns the name of a tensor class with arithmetic of its own, None for plain and sharded tensors."""
    for tensor in (parameter, parameter.data):
        kind = type(tensor)
        if kind in (Tensor, nn.Parameter) or hasattr(tensor, "placements"):
            continue
        if "__torch_dispatch__" in _defined(kind) or "__torch_function__" in _defined(kind):
            return kind.__name__
        if not tensor.is_floating_point() and not tensor.is_complex():
            return kind.__name__
    if parameter.is_quantized:
        return str(parameter.dtype)
    return None


def _defined(kind: type) -> Iterable[str]:
    """Returns what a tensor class defines itself, above torch's own."""
    return {
        name
        for base in kind.__mro__
        if base not in (Tensor, nn.Parameter) and base.__module__ != "torch._C"
        for name, value in base.__dict__.items()
        if value is not torch._C._disabled_torch_function_impl
    }


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
