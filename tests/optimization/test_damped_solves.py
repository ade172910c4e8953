"""One Krylov space a group serves every damping: solutions are the dense ones and those of conjugate gradients alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.errors import UserError
from hessprobe.optimization.conjugate_gradient import conjugate_gradient
from hessprobe.optimization.damped_solves import damped_solves
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import oracles
from tests.models import ZOO, seeded
from tests.operators import DenseOperator, with_spectrum

SIZES = {"a": 4, "b": 5, "c": 3}
DAMPINGS = (0.05, 1.0, 0.001)
GROUPINGS = {
    "full": [["a", "b", "c"]],
    "layerwise": [["a"], ["b"], ["c"]],
    "a gap in a group": [["c", "a"], ["b"]],
    "a block in no group": [["c"], ["a"]],
}


def problem(low: float = 0.0, high: float = 2.0) -> tuple[DenseOperator, Tensor]:
    generator = seeded(7)
    values = torch.linspace(low, high, 12).tolist()
    operator = DenseOperator(with_spectrum(values, generator), SIZES)
    return operator, torch.randn(12, generator=generator, dtype=torch.float64)


def solved(matrix: Tensor, b: Tensor, mu: float, groups: list[list[str]], slices: dict[str, slice]) -> Tensor:
    """Returns the dense solution, group by group."""
    found = torch.zeros_like(b)
    for group in groups:
        index = torch.cat([torch.arange(slices[block].start, slices[block].stop) for block in group])
        own = matrix[index][:, index] + mu * torch.eye(len(index), dtype=b.dtype)
        found[index] = torch.linalg.solve(own, b[index])
    return found


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
def test_every_damping_and_grouping_equals_the_dense_solve(groups):
    operator, b = problem()
    found = damped_solves(operator, b, DAMPINGS, groups=groups, tolerance=1e-12)
    assert found.outcome == ("converged",) * 3 and found.x.shape == (3, 12)
    for mu, x in zip(DAMPINGS, found.x, strict=True):
        wanted = solved(operator.matrix, b, mu, groups, operator.partition.slices)
        torch.testing.assert_close(x, wanted, rtol=1e-9, atol=1e-9)
    assert float(found.residual.max()) < 1e-11


@pytest.mark.parametrize("name", ["decoder_swiglu_layernorm", "decoder_tied"])
@pytest.mark.parametrize("keep", [0, 2**30])
def test_gauss_newton_equals_the_dense_solve_full_and_layerwise(zoo_case, name, keep):
    case = zoo_case(name)
    operator, g = case.gauss_newton().linearised(keep), case.truth.gradient
    for groups in ([list(case.partition.blocks)], [[block] for block in case.partition.blocks]):
        found = damped_solves(operator, g, (0.1, 0.01), groups=groups, tolerance=1e-12, iterations=400)
        for mu, x in zip((0.1, 0.01), found.x, strict=True):
            wanted = solved(case.truth.gauss_newton, g, mu, groups, case.partition.slices)
            assert oracles.relative_error(x, wanted) < 1e-8


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_iterates_are_those_of_conjugate_gradients_for_each_damping_alone(steps):
    operator, b = problem()
    found = damped_solves(operator, b, DAMPINGS, tolerance=1e-12, iterations=steps)
    for i, mu in enumerate(DAMPINGS):
        alone = conjugate_gradient(operator.damped(mu), b[None], tolerance=1e-12, iterations=steps)
        torch.testing.assert_close(found.x[i], alone.x[0], rtol=1e-9, atol=1e-11)
        assert found.outcome[i] == alone.outcome == f"reached {steps} iterations"
        assert float(found.residual[i]) == pytest.approx(float(alone.residual), rel=1e-8)
        assert found.iterations[i] == steps


def test_iterates_of_groups_are_those_of_each_group_alone():
    operator, b = problem()
    groups = [["c", "a"], ["b"]]
    found = damped_solves(operator, b, (0.05,), groups=groups, tolerance=1e-12, iterations=2)
    alone = [
        conjugate_gradient(operator.damped(0.05), b[None], tolerance=1e-12, iterations=2, blocks=group)
        for group in groups
    ]
    torch.testing.assert_close(found.x[0], alone[0].x[0] + alone[1].x[0], rtol=1e-9, atol=1e-11)


def test_the_residual_is_the_true_one_of_all_groups_together():
    operator, b = problem()
    groups = GROUPINGS["layerwise"]
    found = damped_solves(operator, b, DAMPINGS, groups=groups, tolerance=1e-12, iterations=2)
    blocks = oracles.block_diagonal(operator.matrix, list(operator.partition.slices.values()))
    for i, mu in enumerate(DAMPINGS):
        true = float((blocks @ found.x[i] + mu * found.x[i] - b).norm() / b.norm())
        assert float(found.residual[i]) == pytest.approx(true, rel=1e-9)
        assert true > 1e-4


def test_large_dampings_are_done_first_and_groups_that_are_done_cost_nothing():
    operator, b = problem()
    where = operator.partition.slices["b"]
    operator.matrix[where] = 0  # b's own block is a multiple of the identity: one product solves it
    operator.matrix[:, where] = 0
    groups = GROUPINGS["layerwise"]
    found = damped_solves(operator, b, (0.001, 10.0), groups=groups, tolerance=1e-4)
    assert found.iterations[1] < found.iterations[0]
    # All three groups in the first product and for both residuals; "b", 5 of the 12 parameters, in no other.
    assert found.products <= 1 + 2 + (found.iterations[0] - 1) * 7 / 12 + 1e-9
    assert found.products >= 1 + 2 + (found.iterations[0] - 1) * 3 / 12


def test_one_product_a_step_serves_all_dampings():
    operator, b = problem()
    found = damped_solves(operator, b, DAMPINGS, tolerance=1e-12, iterations=6)
    assert operator.products == 6 + len(DAMPINGS) == found.products


def test_negative_curvature_is_told_for_the_dampings_that_leave_it_alone():
    operator, b = problem(low=-1.0)
    found = damped_solves(operator, b, (0.1, 1.5), tolerance=1e-10)
    assert found.outcome == ("indefinite: negative curvature", "converged")
    assert bool(found.x.isfinite().all())
    wanted = solved(operator.matrix, b, 1.5, GROUPINGS["full"], operator.partition.slices)
    torch.testing.assert_close(found.x[1], wanted, rtol=1e-7, atol=1e-8)


def test_a_singular_system_is_solved_where_it_has_a_solution_and_told_where_not():
    operator, b = problem()  # the smallest eigenvalue is 0
    inside = operator.matrix @ b
    assert damped_solves(operator, inside, (0.0,), tolerance=1e-9).outcome == ("converged",)
    found = damped_solves(operator, b, (0.0,), tolerance=1e-9, iterations=60)
    assert found.outcome != ("converged",) or float(found.residual) > 1e-9
    assert bool(found.x.isfinite().all()) and float(found.residual) > 0.01


def test_a_zero_right_hand_side_costs_nothing_whole_or_in_one_group():
    operator, b = problem()
    nothing = damped_solves(operator, torch.zeros_like(b), DAMPINGS)
    assert (nothing.outcome, nothing.iterations, operator.products) == (("converged",) * 3, (0,) * 3, 0)
    assert float(nothing.residual.abs().max()) == 0 and not nothing.x.any()
    b[operator.partition.slices["b"]] = 0
    groups = GROUPINGS["layerwise"]
    found = damped_solves(operator, b, DAMPINGS, groups=groups, tolerance=1e-11)
    assert found.outcome == ("converged",) * 3 and not found.x[:, operator.partition.slices["b"]].any()
    wanted = solved(operator.matrix, b, 0.05, groups, operator.partition.slices)
    torch.testing.assert_close(found.x[0], wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("where", ["operator", "right-hand side"])
def test_what_is_not_finite_in_one_group_is_told_and_leaves_the_others_alone(where):
    operator, b = problem()
    clean, groups = operator.matrix.clone(), GROUPINGS["layerwise"]
    if where == "operator":
        operator.matrix[1, 2] = torch.nan  # in block "a"
    else:
        b[1] = torch.inf
    found = damped_solves(operator, b, DAMPINGS, groups=groups, tolerance=1e-11)
    assert found.outcome == ("not finite",) * 3 and bool(found.x.isfinite().all())
    finite = torch.nan_to_num(b, posinf=0.0)
    wanted = solved(clean, finite, 0.05, [["b"], ["c"]], operator.partition.slices)
    rest = slice(4, 12)
    torch.testing.assert_close(found.x[0, rest], wanted[rest], rtol=1e-8, atol=1e-9)


def test_single_precision_reaches_what_it_can_and_says_how_far_that_is():
    problem_ = ZOO["decoder_tied"](seeded(3))
    model = problem_.model.float()
    objective, partition = Objective(model), Partition.of(model)
    operator = GaussNewton(objective, problem_.batches, partition).linearised(2**30)
    g = objective.gradient(problem_.batches, partition)[1]
    found = damped_solves(operator, g, (0.1, 0.01), tolerance=1e-5, iterations=300)
    assert found.x.dtype == torch.float32 and found.outcome == ("converged",) * 2
    for mu, x, said in zip((0.1, 0.01), found.x, found.residual, strict=True):
        true = operator.damped(mu).apply(x[None])[0] - g
        assert float(true.norm() / g.norm()) == pytest.approx(float(said), rel=0.05)
        assert float(said) < 1e-4


def test_mistakes_are_told_with_the_way_out():
    operator, b = problem()
    with pytest.raises(UserError, match=r"wanted a right-hand side \(12,\), got \(1, 12\)"):
        damped_solves(operator, b[None], DAMPINGS)
    for wrong in ((), (-0.1,), (float("nan"),)):
        with pytest.raises(UserError, match="dampings of 0 or more"):
            damped_solves(operator, b, wrong)
    with pytest.raises(UserError, match="must be positive"):
        damped_solves(operator, b, DAMPINGS, iterations=0)
    with pytest.raises(UserError, match="'d'"):
        damped_solves(operator, b, DAMPINGS, groups=[["d"]])
    with pytest.raises(UserError, match="a named more than once"):
        damped_solves(operator, b, DAMPINGS, groups=[["a"], ["a", "b"]])
