"""Ritz values of M^-1/2 A M^-1/2 from products with A and M^-1 alone are the dense ones, and lie within their residuals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.estimation.conditioning import conditioning
from hessprobe.estimation.lanczos import lanczos
from tests.models import seeded
from tests.operators import DenseOperator, random_symmetric, with_spectrum

P = 30


def problem(spectrum: list[float] | None = None) -> tuple[DenseOperator, Tensor, Tensor]:
    """Returns A, M^-1 and the eigenvalues of M^-1/2 A M^-1/2."""
    a = random_symmetric(P, seeded(1)) if spectrum is None else with_spectrum(spectrum, seeded(1))
    inverse = with_spectrum(torch.linspace(0.1, 3.0, P).tolist(), seeded(2))
    root = torch.linalg.cholesky(inverse)
    return DenseOperator(a), inverse, torch.linalg.eigvalsh(root.T @ a @ root)


def test_as_many_steps_as_dimensions_give_the_extremes_exactly():
    operator, inverse, values = problem()
    found = conditioning(operator, lambda v: v @ inverse, P, generator=seeded(3))
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-9)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-9)
    assert found.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    assert max(found.largest_residual, found.smallest_residual) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_fewer_steps_bound_the_extremes_from_within_and_residuals_say_how_near(steps):
    operator, inverse, values = problem(torch.logspace(-2, 1, P).tolist())
    found = conditioning(operator, lambda v: v @ inverse, steps, generator=seeded(3))
    assert found.steps == steps == operator.products
    assert values[0] - 1e-12 <= found.smallest <= found.largest <= values[-1] + 1e-12
    assert found.condition <= float(values[-1] / values[0])
    for ritz, residual in (
        (found.largest, found.largest_residual),
        (found.smallest, found.smallest_residual),
    ):
        assert float((values - ritz).abs().min()) <= residual + 1e-10


def test_without_a_preconditioner_it_is_plain_lanczos():
    operator, _, _ = problem()
    found = conditioning(operator, lambda v: v, 6, generator=seeded(3))
    plain = lanczos(operator, 6, generator=seeded(3))
    assert found.largest == pytest.approx(float(plain.ritz_values[-1]), rel=1e-10)
    assert found.smallest_residual == pytest.approx(float(plain.residuals[0]), rel=1e-8)


def test_the_exact_inverse_ends_after_one_step_with_condition_1():
    operator, _, _ = problem(torch.linspace(0.1, 5, P).tolist())
    inverse = torch.linalg.inv(operator.matrix)
    found = conditioning(operator, lambda v: v @ inverse, 20, generator=seeded(3))
    assert found.steps == 1 and found.condition == pytest.approx(1.0) and found.largest_residual == 0


def test_mistakes_are_told():
    operator, inverse, _ = problem()
    with pytest.raises(UserError, match="at least 1, got 0"):
        conditioning(operator, lambda v: v, 0, generator=seeded(3))
    with pytest.raises(UserError, match="not positive definite"):
        conditioning(operator, lambda v: -v @ inverse, 3, generator=seeded(3))
    with pytest.raises(FloatingPointError, match="not finite"):
        conditioning(operator, lambda v: v * torch.nan, 3, generator=seeded(3))
