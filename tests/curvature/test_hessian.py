"""The Hessian operator equals the loss differentiated twice, by either engine; G = H for linear models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvlinops import HessianLinearOperator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hessprobe.errors import UserError
from tests import models, oracles
from tests.cases import Case

EXACT = 1e-10
ENGINES = ("forward-over-reverse", "reverse-over-reverse")
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", models.ZOO)
def test_dense_form_equals_the_oracle(zoo_case: Zoo, name: str, engine: str) -> None:
    case = zoo_case(name)
    assert oracles.relative_error(case.hessian(engine=engine).to_dense(), case.truth.hessian) < EXACT


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", ["layernorm", "decoder_swiglu_layernorm", "decoder_ragged", "custom_loss"])
def test_products_with_k_rows_equal_the_oracle(zoo_case: Zoo, name: str, engine: str, k: int) -> None:
    case = zoo_case(name)
    v = case.rows(k)
    product = case.hessian(engine=engine).apply(v)
    assert not product.requires_grad
    assert oracles.relative_error(product, v @ case.truth.hessian) < EXACT


@pytest.mark.parametrize("name", models.ZOO)
def test_the_residual_is_hessian_minus_gauss_newton(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    v = case.rows(3)
    product = (case.hessian() - case.gauss_newton()).apply(v)
    # Relative to H, not to R: for a model linear in its parameters R is zero.
    assert (product - v @ case.truth.residual).abs().max() < EXACT * (v @ case.truth.hessian).abs().max()


@pytest.mark.parametrize("name", models.LINEAR)
def test_equals_gauss_newton_where_the_model_is_linear_in_its_parameters(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    v = case.rows(3)
    assert oracles.relative_error(case.hessian().apply(v), case.gauss_newton().apply(v)) < EXACT


@pytest.mark.parametrize("engine", ENGINES)
def test_is_symmetric_where_torch_func_hessian_is_not(zoo_case: Zoo, engine: str) -> None:
    dense = zoo_case("layernorm").hessian(engine=engine).to_dense()
    assert oracles.relative_error(dense, dense.T) < EXACT


@pytest.mark.xfail(
    strict=True,
    reason="curvlinops 3.0.1: forward mode over jacrev, silently wrong for affine LayerNorm in torch 2.13",
)
def test_curvlinops_hessian_is_right_on_affine_layernorm(zoo_case: Zoo) -> None:
    case = zoo_case("layernorm")
    named = dict(case.problem.model.named_parameters())
    theirs = HessianLinearOperator(
        case.problem.model,
        nn.CrossEntropyLoss(),
        [named[parameter] for parameter in case.partition.names],  # type: ignore[misc]
        case.problem.batches,
        check_deterministic=False,
    )
    v = case.rows(3)
    assert oracles.relative_error((theirs @ v.T).T, v @ case.truth.hessian) < EXACT


def test_can_be_taken_at_other_parameters_than_the_models(generator: Seeded) -> None:
    case = Case.on(models.layernorm(generator(3)))
    theta = case.partition.vector(case.problem.model) + 0.3 * case.rows(1)[0]
    there = oracles.dense(*case.problem, theta=case.partition.unflatten(theta)).in_order(case.partition.names)
    v = case.rows(2)
    for engine in ENGINES:
        product = case.hessian(engine=engine, parameters=theta).apply(v)
        assert oracles.relative_error(product, v @ there.hessian) < EXACT


def test_an_unknown_engine_lists_the_engines(zoo_case: Zoo) -> None:
    with pytest.raises(UserError, match="forward-over-reverse.*reverse-over-reverse"):
        zoo_case("mlp_classifier").hessian(engine="backward-over-forward")


# -- models that forward mode cannot pass through ----------------------------------------------------------


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


def awkward(name: str, generator: Seeded) -> Case:
    draws = generator(13)
    batches = [(models.real(draws, n, 4), models.labels(draws, 4, n)) for n in (6, 3)]
    return Case.on(models.Problem(models.redraw(AWKWARD[name](), draws), batches, "cross_entropy"))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", AWKWARD)
def test_auto_takes_reverse_over_reverse_where_the_model_forces_it(
    generator: Seeded, name: str, k: int
) -> None:
    case = awkward(name, generator)
    operator = case.hessian(engine="auto")
    v = case.rows(k)
    assert oracles.relative_error(operator.apply(v), v @ case.truth.hessian) < EXACT
    assert operator.engine == "reverse-over-reverse"


def test_auto_takes_forward_over_reverse_where_it_can(zoo_case: Zoo) -> None:
    operator = zoo_case("decoder").hessian(engine="auto")
    operator.apply(zoo_case("decoder").rows(1))
    assert operator.engine == "forward-over-reverse"


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", AWKWARD)
def test_gauss_newton_is_right_without_forward_mode_too(generator: Seeded, name: str, k: int) -> None:
    case = awkward(name, generator)
    v = case.rows(k)
    assert oracles.relative_error(case.gauss_newton().apply(v), v @ case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("name", AWKWARD)
def test_column_restricted_products_are_right_without_forward_mode_too(generator: Seeded, name: str) -> None:
    case = awkward(name, generator)
    column, row = case.partition.blocks[0], case.partition.blocks[-1]
    v = torch.zeros(2, case.partition.size, dtype=torch.float64)
    v[:, case.partition.slices[column]] = case.rows(2)[:, case.partition.slices[column]]
    for operator, truth in (
        (case.gauss_newton(), case.truth.gauss_newton),
        (case.hessian(), case.truth.hessian),
    ):
        wanted = torch.zeros_like(v)
        wanted[:, case.partition.slices[row]] = (v @ truth)[:, case.partition.slices[row]]
        assert oracles.relative_error(operator.apply(v, columns=[column], rows=[row]), wanted) < EXACT


class OnceOnly(torch.autograd.Function):
    """A function whose gradient cannot be differentiated again, as hand-written fused kernels often are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangents[0] * (1 - x.tanh() ** 2)


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(OnceOnly.apply(self.body(x)))  # type: ignore[arg-type]


def test_a_model_without_second_derivatives_raises_instead_of_answering(generator: Seeded) -> None:
    draws = generator(14)
    problem = models.Problem(
        models.redraw(Kernel(), draws),
        [(models.real(draws, 5, 4), models.labels(draws, 4, 5))],
        "cross_entropy",
    )
    from hessprobe.curvature.hessian import Hessian
    from hessprobe.problem.objective import Objective
    from hessprobe.problem.partition import Partition

    partition = Partition.of(problem.model, "module")
    v = torch.ones(1, partition.size, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="(?i)differentiable"):
        Hessian(Objective(problem.model), problem.batches, partition).apply(v)
