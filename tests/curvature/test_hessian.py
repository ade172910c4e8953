"""The Hessian operator equals the loss differentiated twice, by either engine; G = H for linear models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from curvlinops import HessianLinearOperator
from torch import nn

from hessprobe.errors import UserError
from tests import models, oracles
from tests.cases import Case, rows_of

EXACT = 1e-10
ENGINES = ("forward-over-reverse", "reverse-over-reverse")
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", models.ZOO)
def test_dense_form_equals_the_oracle(zoo_case: Zoo, name: str, engine: str) -> None:
    case = zoo_case(name)
    if engine == "reverse-over-reverse" and case.partition.size > 100:  # row by row: dense would take seconds
        v = case.rows(5)
        assert oracles.relative_error(case.hessian(engine=engine).apply(v), v @ case.truth.hessian) < EXACT
    else:
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
    assert oracles.relative_error(rows_of(theirs, v), v @ case.truth.hessian) < EXACT


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


def test_follows_the_model_where_no_parameters_are_given(generator: Seeded) -> None:
    case = Case.on(models.layernorm(generator(4)))
    operator, v = case.hessian(), case.rows(2)
    operator.apply(v)
    case.partition.assign(case.problem.model, case.partition.vector(case.problem.model) + 0.1)
    now = oracles.dense(*case.problem).in_order(case.partition.names)
    assert oracles.relative_error(operator.apply(v), v @ now.hessian) < EXACT
