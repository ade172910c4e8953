"""gelu and silu inside `exact_rules`: the same function, and second derivatives equal to autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.problem.operation_rules import exact_rules

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu module": nn.GELU(),
    "silu": F.silu,
    "silu module": nn.SiLU(),
}
WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
X = torch.linspace(-6, 6, 61, dtype=torch.float64)


def written_out(name: str) -> Callable[[Tensor], Tensor]:
    return WRITTEN_OUT[name.removesuffix(" module")]


def weighted_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of sum sin(f(x)): its slope holds f', f'' and the loss's own curvature."""
    z, pull_back, *_ = torch.func.vjp(lambda x: torch.sin(f(x)).sum(), x)
    return pull_back(torch.ones_like(z))[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivatives_equal_those_of_the_formula_written_out(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(3, X.numel(), generator=generator, dtype=torch.float64)

    def along(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.vmap(lambda t: torch.func.jvp(lambda x: weighted_gradient(f, x), (X,), (t,))[1])(
            tangents
        )

    with exact_rules("cpu"):
        found = along(ACTIVATIONS[name])
        single = torch.func.jvp(lambda x: weighted_gradient(ACTIVATIONS[name], x), (X,), (tangents[0],))[1]
    expected = along(written_out(name))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(single, expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reverse_over_reverse_equals_the_formula_written_out(name: str) -> None:
    def second(f: Callable[[Tensor], Tensor]) -> Tensor:
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(torch.sin(f(x)).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with exact_rules("cpu"):
        found = second(ACTIVATIONS[name])
    torch.testing.assert_close(found, second(written_out(name)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_torchs_own_bit_for_bit(name: str) -> None:
    x = X.float()
    with exact_rules("cpu"):
        found = ACTIVATIONS[name](x)
    assert torch.equal(found, ACTIVATIONS[name](x))


def test_an_activation_in_place_stays_in_place() -> None:
    x = X.clone()
    with exact_rules("cpu"):
        y = F.silu(x, inplace=True)
    assert y is x and torch.equal(x, F.silu(X))
