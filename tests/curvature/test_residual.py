"""The residual in one pass equals H - G, by either engine, and is exactly zero for models linear in theta."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.gradient_graph import GradientGraph
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.residual import Residual
from tests import models, oracles
from tests.cases import Case, masked

EXACT = 1e-10
ENGINES = ("forward-over-reverse", "reverse-over-reverse")
Zoo = Callable[[str], Case]


def residual(case: Case, **options: str) -> Residual:
    return Residual(case.objective, case.problem.batches, case.partition, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in models.ZOO if name not in models.LINEAR])
def test_products_equal_the_oracle(zoo_case: Zoo, name: str, engine: str, k: int) -> None:
    case = zoo_case(name)
    v = case.rows(k)
    product = residual(case, engine=engine).apply(v)
    assert not product.requires_grad
    assert oracles.relative_error(product, v @ case.truth.residual) < EXACT


@pytest.mark.parametrize("kind", [Hessian, Residual])
def test_a_first_micro_batch_without_a_target_changes_nothing(zoo_case: Zoo, kind: type[Hessian]) -> None:
    case = zoo_case("decoder")
    x, y = case.problem.batches[0]
    batches = [(x, torch.full_like(y, models.IGNORED)), *case.problem.batches]
    v = case.rows(2)
    kept = kind(case.objective, batches, case.partition).linearised(2**30)
    wanted = kind(case.objective, case.problem.batches, case.partition).apply(v)
    assert oracles.relative_error(kept.apply(v), wanted) < EXACT and kept.from_graphs


@pytest.mark.parametrize("name", ["layernorm", "decoder_tied", "decoder_swiglu_layernorm"])
def test_no_engine_is_given_up_on_these(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    operator = residual(case)
    operator.apply(case.rows(3))
    operator.apply(case.rows(1))
    assert operator.engine == ENGINES[0] and operator._batched


@pytest.mark.parametrize("name", ["decoder_tied", "layernorm"])
def test_restricted_products_equal_the_blocks(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    v, operator = case.rows(2), residual(case)
    for columns in case.partition.blocks:
        for rows in case.partition.blocks:
            wanted = masked(case, masked(case, v, [columns]) @ case.truth.residual, [rows])
            found = operator.apply(v, columns=[columns], rows=[rows])
            assert (found - wanted).abs().max() < EXACT * case.truth.residual.abs().max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", models.LINEAR)
def test_is_zero_to_the_last_digit_where_the_model_is_linear(zoo_case: Zoo, name: str, engine: str) -> None:
    case = zoo_case(name)
    assert not residual(case, engine=engine).apply(case.rows(2)).any()


# -- the Hessian's and the residual's graphs, made once ------------------------------------------------------

KEEP = 2**30


@pytest.mark.parametrize("which", ["hessian", "residual"])
@pytest.mark.parametrize("name", ["layernorm", "decoder_swiglu_layernorm", "decoder_ragged", "custom_loss"])
def test_products_from_kept_graphs_equal_the_oracle(zoo_case: Zoo, name: str, which: str) -> None:
    case = zoo_case(name)
    operator = (case.hessian() if which == "hessian" else residual(case)).linearised(KEEP)
    truth, v = getattr(case.truth, which), case.rows(2)
    for rows in (v, v[:1], 3 * v):  # again and again from the same graphs
        assert oracles.relative_error(operator.apply(rows), rows @ truth) < EXACT
    for block in case.partition.blocks:
        wanted = masked(case, masked(case, v, [block]) @ truth, [block])
        found = operator.apply(v, columns=[block], rows=[block])
        assert not found.requires_grad
        assert (found - wanted).abs().max() < EXACT * truth.abs().max()


@pytest.mark.parametrize("name", models.LINEAR)
def test_kept_graphs_of_linear_models_have_no_residual(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    operator = residual(case).linearised(KEEP)
    assert not operator.apply(case.rows(2)).any()
    v = case.rows(2)
    assert oracles.relative_error(case.hessian().linearised(KEEP).apply(v), v @ case.truth.hessian) < EXACT


def test_the_network_is_run_once_for_any_number_of_products() -> None:
    case = Case.on(models.mlp_regression(models.seeded(4)))
    operator, calls = case.hessian().linearised(KEEP), []
    case.problem.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        operator.apply(case.rows(2))
    # Once a piece, once for the first one's comparison with the other engine, and four times, once for a model, to see
    # whether that engine is to be believed.
    assert operator.from_graphs and len(operator.pieces) == 2 and len(calls) == 7


def test_kept_graphs_stay_at_the_theta_they_were_made_at() -> None:
    case = Case.on(models.mlp_regression(models.seeded(4)))
    operator, v = case.hessian().linearised(KEEP), case.rows(1)
    case.partition.assign(case.problem.model, case.partition.vector(case.problem.model) + 1)
    assert oracles.relative_error(operator.apply(v), v @ case.truth.hessian) < EXACT


def test_graphs_that_hold_too_much_are_let_go() -> None:
    case = Case.on(models.mlp_regression(models.seeded(4)))
    roomy, v = case.hessian().linearised(KEEP), case.rows(2)
    roomy.apply(v)
    held = sum(graph.bytes for graph in roomy._kept.values())
    assert held > 500
    for keep in (1, held - 1, held):
        operator = case.hessian().linearised(keep)
        assert oracles.relative_error(operator.apply(v), v @ case.truth.hessian) < EXACT
        assert operator.from_graphs == (keep == held)


def test_second_derivatives_that_are_silently_missing_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that drops out of the graph without an error: the comparison with the other engine tells."""
    case = Case.on(models.mlp_regression(models.seeded(5)))
    real = GradientGraph.product

    def short(self: GradientGraph, *arguments: Any) -> dict[str, Tensor]:
        return {name: 0.9 * x for name, x in real(self, *arguments).items()}

    monkeypatch.setattr(GradientGraph, "product", short)
    operator, v = case.hessian().linearised(KEEP), case.rows(2)
    assert oracles.relative_error(operator.apply(v), v @ case.truth.hessian) < EXACT
    assert not operator.from_graphs
    trusted = case.hessian().linearised(KEEP, compare=False)
    assert oracles.relative_error(trusted.apply(v), 0.9 * v @ case.truth.hessian) < EXACT


def test_graphs_are_freed_with_their_operator() -> None:
    """A node that keeps its own output (tanh) is a circle out of the collector's sight, if a hook closes it."""
    case = Case.on(models.mlp_regression(models.seeded(4)))
    operator = case.hessian().linearised(KEEP)
    operator.apply(case.rows(1))
    graph = next(iter(operator._kept.values()))
    alive = [weakref.ref(graph), *(weakref.ref(leaf) for leaf in graph.leaves.values())]
    del operator, graph
    gc.collect()
    assert not any(reference() is not None for reference in alive)
