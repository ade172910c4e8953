"""Conjugate gradients solve every group's damped system on the whole outer batch, and say what became of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hessprobe.optimization import inner_solve
from hessprobe.optimization.conjugate_gradient import Solution
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.problem.objective import Objective
from tests import oracles
from tests.optimization.linearised import places
from tests.optimization.stepping import fresh, named_groups, points, regression, theta_of, truth_on

POINTS = {"full": "full", "layerwise": "layerwise", "groups": (("3", "0"), ("1",))}
by_points_structure = pytest.mark.parametrize("structure", POINTS.values(), ids=POINTS)


@by_points_structure
def test_conjugate_gradients_are_the_dense_damped_solve_of_every_group(structure):
    damping, batches, search = 0.1, points(1, 7, 3), points(1, 7)
    case, optimizer = fresh(
        "layernorm", "module", structure=structure, solver="cg", damping=damping, cg_tolerance=1e-12,
        cg_iterations=400,
    )  # fmt: skip
    for share in (0.0, 0.4, -1.0):  # a cold start, a warm one, and one that is worse than none
        theta = theta_of(case)
        truth = truth_on(case, batches)
        wanted, values, begun = torch.zeros_like(theta), [], []
        for group in named_groups(case, structure):
            where = places(case, group)
            identity = torch.eye(len(where), dtype=torch.float64)
            block = truth.gauss_newton[where][:, where] + damping * identity
            wanted[where] = torch.linalg.solve(block, -truth.gradient[where])
            values.append(float(truth.loss + 0.5 * truth.gradient[where] @ wanted[where]))
            at = share * wanted[where]
            warm = float(truth.loss + truth.gradient[where] @ at + 0.5 * at @ block @ at)
            begun.append(min(warm, float(truth.loss)))
        for name, x in case.partition.unflatten(theta + share * wanted).items():
            optimizer.inner[name].copy_(x)
        report = optimizer.step(batches, search)
        assert oracles.relative_error(case.partition.flatten(optimizer.inner), theta + wanted) < 1e-8
        assert report.outcome == "accepted"
        assert report.inner_residual < 1e-10
        assert report.gradient_norm == pytest.approx(float(truth.gradient.norm()), rel=1e-9)
        ends = (sum(begun) / len(begun), sum(values) / len(values))
        assert report.inner_loss == pytest.approx(ends, rel=1e-9)
        assert (report.inner_loss[0] < float(truth.loss) - 1e-6) == (share == 0.4)
        assert report.inner_iterations > 5 and report.tokens == 10


@by_points_structure
def test_the_residual_of_a_solve_cut_short_is_the_dense_one(structure):
    damping, batches = 0.05, points(1, 7, 3)
    case, optimizer = fresh(
        "layernorm", "module", structure=structure, solver="cg", damping=damping, cg_iterations=3
    )
    theta, truth = theta_of(case), truth_on(case, batches)
    report = optimizer.step(batches, points(1, 7))
    delta, left = case.partition.flatten(optimizer.inner) - theta, truth.gradient.clone()
    groups = named_groups(case, structure)
    for group in groups:
        where = places(case, group)
        left[where] += truth.gauss_newton[where][:, where] @ delta[where] + damping * delta[where]
    assert report.inner_residual == pytest.approx(float(left.norm() / truth.gradient.norm()), rel=1e-8)
    assert report.inner_residual > 1e-3 and report.inner_iterations == 3
    products, k = 4 * len(groups), len(groups)
    solving = 2 * (1 + products * 5 / 6 * (1 + 1 / k))
    assert report.gradient_equivalents == pytest.approx(solving + (len(optimizer.grid) + 1) / 3 + 1)


class Welsch:
    """1 - exp(-(z - y)^2 / 2): curved downwards where |z - y| > 1, so that G there is negative."""

    __name__ = "welsch"

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return (1 - (-((z - y) ** 2) / 2).exp()).sum(-1)


def on_a_slope(**settings) -> tuple[nn.Module, GaussNewton, list]:
    """Returns a weight of 1.7 that should be 0, where the curvature is about -0.45, its optimizer and data."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.7)
    one = torch.ones(1, 1, dtype=torch.float64)
    objective = Objective(model, loss=Welsch())
    return (
        model,
        GaussNewton(model, objective, partition="module", solver="cg", **settings),
        [(one, torch.zeros_like(one))],
    )


def test_negative_curvature_is_damped_and_tried_again():
    model, optimizer, batches = on_a_slope(damping=0.2)
    report = optimizer.step(batches)
    assert report.outcome == "accepted after 1 retry at damping 0.8"
    curvature = (1 - 1.7**2) * math.exp(-(1.7**2) / 2)
    step = -1.7 * math.exp(-(1.7**2) / 2) / (curvature + 0.8)
    assert float(model.weight.detach()) == pytest.approx(1.7 + report.step_size * step, rel=1e-9)
    assert report.inner_residual < 1e-10


def test_negative_curvature_that_no_retry_mends_is_told():
    model, optimizer, batches = on_a_slope(damping=0.0)
    report = optimizer.step(batches)
    assert report.outcome == (
        "rejected: no step size lowers the loss after 2 retries at damping 0.04 "
        "(conjugate gradients: indefinite: negative curvature)"
    )
    assert float(model.weight.detach()) == 1.7


def test_a_residual_that_grew_is_damped_and_tried_again(monkeypatch):
    solve, dampings = inner_solve.conjugate_gradient, []

    def losing_its_way(operator, b, **options) -> Solution:
        found = solve(operator, b, **options)
        dampings.append(operator.damping)
        return replace(found, residual=found.residual + 100) if len(dampings) < 3 else found

    monkeypatch.setattr(inner_solve, "conjugate_gradient", losing_its_way)
    settings = {"structure": "layerwise", "solver": "cg", "damping": 0.1}
    _, optimizer = fresh("layernorm", "module", **settings)
    report = optimizer.step(points(1, 7))
    assert report.outcome == "accepted after 1 retry at damping 0.4"
    assert dampings == pytest.approx([0.1] * 3 + [0.4] * 3)


def test_data_that_is_not_finite_is_rejected_by_conjugate_gradients_too():
    case, optimizer = fresh("mlp_regression", "module", solver="cg", damping=0.1)
    theta = theta_of(case)
    report = optimizer.step(regression(1, poison=True), regression(2))
    assert report.outcome == (
        "rejected: the inner solve is not finite after 2 retries at damping 1.6; a lower learning rate or more "
        "damping helps"
    )
    assert torch.equal(theta_of(case), theta)
    assert optimizer.step(regression(3), regression(4)).outcome == "accepted"
