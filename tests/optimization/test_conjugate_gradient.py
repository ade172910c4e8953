"""Conjugate gradients equal dense damped solves, whole and per group of blocks, and say why they stopped."""

from __future__ import annotations

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.optimization.conjugate_gradient import block_conjugate_gradient, conjugate_gradient
from tests.models import seeded
from tests.operators import DenseOperator, with_spectrum

SOLVERS = [conjugate_gradient, block_conjugate_gradient]
SIZES = {"a": 4, "b": 5, "c": 3}
DAMPING = 0.05


def problem(low: float = 0.0, k: int = 3) -> tuple[DenseOperator, torch.Tensor]:
    generator = seeded(7)
    values = torch.linspace(low, 2.0, 12).tolist()
    operator = DenseOperator(with_spectrum(values, generator), SIZES)
    return operator, torch.randn(k, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_equals_the_dense_damped_solve(solve, k):
    operator, b = problem(k=k)
    found = solve(operator.damped(DAMPING), b, tolerance=1e-11)
    dense = operator.matrix + DAMPING * torch.eye(12, dtype=torch.float64)
    wanted = torch.linalg.solve(dense, b.T).T
    assert found.outcome == "converged" and found.converged
    torch.testing.assert_close(found.x, wanted, rtol=1e-9, atol=1e-9)
    assert found.residual.shape == (k,) and float(found.residual.max()) < 1e-10


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_group_of_blocks_is_solved_alone(solve):
    operator, b = problem()
    found = solve(operator.damped(DAMPING), b, tolerance=1e-11, blocks=["a", "c"])
    index = torch.tensor([0, 1, 2, 3, 9, 10, 11])
    dense = operator.matrix[index][:, index] + DAMPING * torch.eye(7, dtype=torch.float64)
    wanted = torch.zeros_like(b)
    wanted[:, index] = torch.linalg.solve(dense, b[:, index].T).T
    torch.testing.assert_close(found.x, wanted, rtol=1e-9, atol=1e-9)
    assert float(found.residual.max()) < 1e-10  # of the group's own system


def test_equals_the_dense_solve_on_a_gauss_newton_matrix(zoo_case):
    case = zoo_case("mlp_regression")
    b = case.rows(2)
    found = conjugate_gradient(case.gauss_newton().damped(0.1), b, tolerance=1e-10, iterations=500)
    dense = case.truth.gauss_newton + 0.1 * torch.eye(case.partition.size, dtype=torch.float64)
    torch.testing.assert_close(found.x, torch.linalg.solve(dense, b.T).T, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solve", SOLVERS)
def test_negative_curvature_is_named_and_the_iterate_stays_finite(solve):
    operator, b = problem(low=-1.0)
    found = solve(operator, b, tolerance=1e-11)
    assert found.outcome == "indefinite: negative curvature"
    assert bool(found.x.isfinite().all()) and not found.converged


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_zero_right_hand_side_costs_nothing_and_leaves_the_others_alone(solve):
    operator, b = problem()
    nothing = solve(operator.damped(DAMPING), torch.zeros_like(b))
    assert (nothing.outcome, nothing.iterations, operator.products) == ("converged", 0, 0)
    b[1] = 0
    found = solve(operator.damped(DAMPING), b, tolerance=1e-11)
    alone = solve(operator.damped(DAMPING), b[2:], tolerance=1e-11)
    assert bool((found.x[1] == 0).all()) and float(found.residual[1]) == 0
    torch.testing.assert_close(found.x[2:], alone.x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solve", SOLVERS)
def test_stopping_early_is_said_and_the_residual_is_the_true_one(solve):
    operator, b = problem()
    found = solve(operator.damped(DAMPING), b, tolerance=1e-11, iterations=2)
    assert found.outcome == "reached 2 iterations" and found.iterations == 2
    dense = operator.matrix + DAMPING * torch.eye(12, dtype=torch.float64)
    true = (found.x @ dense - b).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residual, true)
    assert float(true.max()) > 1e-3


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("where", ["operator", "right-hand side"])
def test_what_is_not_finite_is_named(solve, where):
    operator, b = problem()
    if where == "operator":
        operator.matrix[0, 0] = torch.nan
    else:
        b[0, 0] = torch.inf
    found = solve(operator.damped(DAMPING), b)
    assert found.outcome == "not finite" and bool(found.x.isfinite().all())


def test_rows_have_their_own_krylov_spaces_so_one_bad_row_spoils_no_other():
    operator, b = problem()
    b[0] = torch.nan
    found = conjugate_gradient(operator.damped(DAMPING), b, tolerance=1e-11)
    dense = operator.matrix + DAMPING * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(found.x[1:], torch.linalg.solve(dense, b[1:].T).T, rtol=1e-9, atol=1e-9)


def test_block_search_shares_its_space_and_bears_dependent_rows_of_any_size():
    operator, b = problem()
    b = torch.cat([b, b[:1] + b[1:2], 1e-8 * b[2:]])
    damped = operator.damped(DAMPING)
    shared = block_conjugate_gradient(damped, b, tolerance=1e-10)
    dense = operator.matrix + DAMPING * torch.eye(12, dtype=torch.float64)
    assert float(((shared.x @ dense - b).norm(dim=1) / b.norm(dim=1)).max()) < 1e-9
    assert shared.iterations < conjugate_gradient(damped, b, tolerance=1e-10).iterations


def test_the_exact_preconditioner_needs_one_product():
    operator, b = problem()
    dense = operator.matrix + DAMPING * torch.eye(12, dtype=torch.float64)
    inverse = torch.linalg.inv(dense)
    found = conjugate_gradient(
        operator.damped(DAMPING), b, tolerance=1e-10, preconditioner=lambda r: r @ inverse
    )
    assert found.iterations == 1 and found.converged


@pytest.mark.parametrize("solve", SOLVERS)
def test_mistakes_are_told_with_the_way_out(solve):
    operator, b = problem()
    with pytest.raises(UserError, match=r"b\[None\]"):
        solve(operator, b[0])
    with pytest.raises(UserError, match="must be positive"):
        solve(operator, b, iterations=0)
    with pytest.raises(UserError, match="'d'"):
        solve(operator, b, blocks=["d"])
