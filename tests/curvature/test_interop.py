"""Operators in other forms: dense, SciPy's and curvlinops'; their own algorithms run on them."""

from __future__ import annotations

from collections.abc import Callable

import curvlinops
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import OPERATORS, Case, pair, rows_of

EXACT = 1e-10
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]


@pytest.mark.parametrize("which", OPERATORS)
def test_to_dense_is_the_matrix(zoo_case: Zoo, which: str) -> None:
    operator, truth = pair(zoo_case("mlp_classifier"), which)
    assert oracles.relative_error(operator.to_dense(), truth) < EXACT


def test_to_dense_refuses_above_5000_parameters_and_says_what_to_do(generator: Seeded) -> None:
    model = models.redraw(nn.Linear(101, 50, bias=False), generator(1))
    inputs, targets = models.real(generator(2), 3, 101), models.labels(generator(3), 50, 3)
    operator = GaussNewton(Objective(model), [(inputs, targets)], Partition.of(model, "module"))
    with pytest.raises(UserError, match=r"p = 5,050 \(limit 5,000\).*estimator"):
        operator.to_dense()


@pytest.mark.parametrize("which", OPERATORS)
def test_eigsh_runs_on_the_scipy_form(zoo_case: Zoo, which: str) -> None:
    operator, truth = pair(zoo_case("mlp_classifier"), which)
    scipy_form = operator.to_scipy()
    assert scipy_form.dtype == np.float64
    assert scipy_form.shape == tuple(truth.shape)
    start = np.ones(len(truth))
    found = eigsh(scipy_form, k=3, which="LA", v0=start, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(truth)[-3:].numpy(), rtol=1e-8)


def test_the_scipy_form_multiplies_vectors_and_matrices_from_both_sides(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_regression")
    scipy_form, truth = case.gauss_newton().to_scipy(), case.truth.gauss_newton.numpy()
    v = case.rows(3).numpy()
    np.testing.assert_allclose(scipy_form.matvec(v[0]), truth @ v[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scipy_form.matmat(v.T), truth @ v.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scipy_form.rmatvec(v[0]), truth @ v[0], rtol=1e-9, atol=1e-12)


def test_the_scipy_form_is_float64_for_a_single_precision_model(generator: Seeded) -> None:
    problem = models.mlp_classifier(generator(22))
    model = problem.model.float()
    batches = [(inputs.float(), targets) for inputs, targets in problem.batches]
    scipy_form = GaussNewton(Objective(model), batches, Partition.of(model, "module")).to_scipy()
    product = scipy_form @ np.ones(scipy_form.shape[1])
    assert (scipy_form.dtype, product.dtype) == (np.float64, np.float64)


@pytest.mark.parametrize("which", OPERATORS)
def test_curvlinops_multiplies_with_the_curvlinops_form(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_ragged")
    operator, truth = pair(case, which)
    theirs = operator.to_curvlinops()
    v = case.rows(2)
    assert oracles.relative_error(rows_of(theirs, v), v @ truth) < EXACT
    assert oracles.relative_error(theirs @ v[0], v[0] @ truth) < EXACT


def test_curvlinops_estimators_run_on_the_curvlinops_form(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    truth = case.truth.gauss_newton
    theirs = case.gauss_newton().to_curvlinops()
    samples = 64
    with torch.random.fork_rng():
        torch.manual_seed(4)
        trace = float(curvlinops.hutchinson_trace(theirs, samples))
        low_rank = float(curvlinops.xtrace(theirs, 2 * (len(truth) // 2 - 1)))
    # Var = 2 (|A|_F^2 - sum_i A_ii^2) / samples for Rademacher probes (Hutchinson 1989).
    spread = float(2 * (truth.square().sum() - truth.diagonal().square().sum()) / samples) ** 0.5
    assert abs(trace - float(truth.trace())) < 4 * spread
    # rank(G) <= 6 tokens x 4 free logits < the number of products: XTrace deflates all of it away.
    assert low_rank == pytest.approx(float(truth.trace()), rel=1e-8)
