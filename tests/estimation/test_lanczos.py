"""Lanczos keeps its identities: A Q = Q T + r e^T, Q orthonormal, Ritz values within their residuals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.estimation.lanczos import LanczosResult, lanczos
from tests.cases import Case
from tests.operators import DenseOperator, random_symmetric, with_spectrum

Seeded = Callable[[int], torch.Generator]
SPECTRA = {
    "outliers": [100.0, 37.0, -12.0] + [0.01 * i for i in range(57)],
    "spread over 12 decades": [10.0 ** (-i / 5) for i in range(60)],
    "clusters": [1.0 + 1e-9 * i for i in range(20)] + [5.0] * 20 + [-3.0 + 1e-7 * i for i in range(20)],
    "indefinite": [float(i) for i in range(-30, 30)],
}


def tridiagonal(found: LanczosResult) -> Tensor:
    n = len(found.alphas)
    betas = found.betas[: n - 1]
    return torch.diag(found.alphas) + torch.diag(betas, 1) + torch.diag(betas, -1)


@pytest.mark.parametrize("steps", [1, 2, 12, 40])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_satisfies_the_three_term_recurrence(generator: Seeded, spectrum: str, steps: int) -> None:
    matrix = with_spectrum(SPECTRA[spectrum], generator(1))
    found = lanczos(DenseOperator(matrix), steps, generator=generator(2))
    q, t = found.basis.T, tridiagonal(found)  # columns are the Lanczos vectors
    remainder = matrix @ q - q @ t
    scale = float(matrix.norm())
    assert float(remainder[:, :-1].norm()) < 1e-12 * scale, "only the last column may differ: r e^T"
    assert float((q.T @ remainder).norm()) < 1e-11 * scale, "r is orthogonal to the basis"
    assert float((q.T @ q - torch.eye(len(t), dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_remainder_is_what_the_last_column_lacks(generator: Seeded, spectrum: str) -> None:
    matrix = with_spectrum(SPECTRA[spectrum], generator(1))
    found = lanczos(DenseOperator(matrix), 7, generator=generator(2))
    lacking = matrix @ found.basis.T - found.basis.T @ tridiagonal(found)
    assert found.remainder == pytest.approx(float(lacking[:, -1].norm()), abs=1e-12 * float(matrix.norm()))


def test_weights_are_a_quadrature_exact_to_degree_2m_minus_1(generator: Seeded) -> None:
    # sum_i w_i ritz_i^q = q1 . A^q q1 for q <= 2 m - 1 (Golub and Meurant 2010): what densities are made of.
    matrix = random_symmetric(30, generator(17)) / 10
    start = torch.randn(30, generator=generator(18), dtype=torch.float64)
    found = lanczos(DenseOperator(matrix), 6, generator=generator(19), start=start)
    assert torch.allclose(found.basis[0], start / start.norm())
    power = start / start.norm()
    for degree in range(12):
        moment = float((found.weights * found.ritz_values**degree).sum())
        assert moment == pytest.approx(float(power @ start / start.norm()), rel=1e-10, abs=1e-12), degree
        power = matrix @ power


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_ritz_value_lies_within_its_residual_of_an_eigenvalue(generator: Seeded, spectrum: str) -> None:
    matrix = with_spectrum(SPECTRA[spectrum], generator(3))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    found = lanczos(DenseOperator(matrix), 20, generator=generator(4))
    distances = (found.ritz_values[:, None] - eigenvalues).abs().amin(1)
    assert (distances <= found.residuals + 1e-12 * eigenvalues.abs().max()).all()
    assert (found.ritz_values.diff() >= 0).all(), "in ascending order"
    assert found.ritz_values[0] >= eigenvalues[0] - 1e-11 * eigenvalues.abs().max()
    assert found.ritz_values[-1] <= eigenvalues[-1] + 1e-11 * eigenvalues.abs().max()


def test_residuals_are_those_of_the_ritz_vectors(generator: Seeded) -> None:
    matrix = with_spectrum(SPECTRA["indefinite"], generator(3))
    found = lanczos(DenseOperator(matrix), 15, generator=generator(4))
    values, vectors = torch.linalg.eigh(tridiagonal(found))
    ritz_vectors = found.basis.T @ vectors
    residuals = (matrix @ ritz_vectors - ritz_vectors * values).norm(dim=0)
    assert torch.allclose(found.ritz_values, values, atol=1e-12)
    assert torch.allclose(found.residuals, residuals, atol=1e-11)


def test_finds_outliers_in_few_steps(generator: Seeded) -> None:
    found = lanczos(
        DenseOperator(with_spectrum(SPECTRA["outliers"], generator(5))), 14, generator=generator(6)
    )
    assert float(found.ritz_values[-1]) == pytest.approx(100, rel=1e-10)
    assert float(found.ritz_values[-2]) == pytest.approx(37, rel=1e-8)
    assert float(found.ritz_values[0]) == pytest.approx(-12, rel=1e-8)


def test_all_steps_give_all_eigenvalues(generator: Seeded) -> None:
    matrix = random_symmetric(25, generator(7))
    found = lanczos(DenseOperator(matrix), 25, generator=generator(8))
    assert torch.allclose(found.ritz_values, torch.linalg.eigvalsh(matrix), atol=1e-10)
    assert found.residuals.max() < 1e-9


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_invariant_subspace_ends_the_recurrence(generator: Seeded, rank: int) -> None:
    # The Krylov space of a rank-r matrix has r + 1 dimensions: there is nothing to find in further steps.
    nonzero = [5.0, -2.0, 1.0][:rank]
    operator = DenseOperator(with_spectrum(nonzero + [0.0] * (40 - rank), generator(9)))
    found = lanczos(operator, 20, generator=generator(10))
    for values in (found.alphas, found.betas, found.ritz_values, found.residuals, found.basis):
        assert values.isfinite().all()
    q = found.basis.T
    assert float((q.T @ q - torch.eye(q.shape[1], dtype=torch.float64)).abs().max()) < 1e-12
    assert len(found.ritz_values) == rank + 1
    wanted = torch.tensor(sorted([*nonzero, 0.0]), dtype=torch.float64)
    assert torch.allclose(found.ritz_values, wanted, atol=1e-10)
    assert found.residuals.max() < 1e-9


def test_breakdown_is_judged_relative_to_the_matrix_not_absolutely(generator: Seeded) -> None:
    spectrum = [1e-9 * value for value in SPECTRA["indefinite"]]
    found = lanczos(DenseOperator(with_spectrum(spectrum, generator(11))), 20, generator=generator(12))
    assert len(found.ritz_values) == 20
    assert float(found.ritz_values[-1]) == pytest.approx(29e-9, rel=0.05)


def test_a_block_is_measured_as_if_it_were_the_whole(generator: Seeded) -> None:
    sizes = {"embedding": 6, "block.0": 12, "head": 5}
    matrix = random_symmetric(23, generator(13))
    operator = DenseOperator(matrix, sizes)
    found = lanczos(operator, 12, generator=generator(14), block="block.0")
    assert torch.allclose(found.ritz_values, torch.linalg.eigvalsh(matrix[6:18, 6:18]), atol=1e-10)


def test_extreme_eigenvalues_of_a_decoders_matrices(
    zoo_case: Callable[[str], Case], generator: Seeded
) -> None:
    case = zoo_case("decoder_tied")
    for operator, truth in (
        (case.gauss_newton(), case.truth.gauss_newton),
        (case.hessian(), case.truth.hessian),
    ):
        eigenvalues = torch.linalg.eigvalsh(truth)
        found = lanczos(operator, 40, generator=generator(15))
        assert float(found.ritz_values[-1]) == pytest.approx(float(eigenvalues[-1]), rel=1e-8)
        assert abs(float(found.ritz_values[0] - eigenvalues[0])) <= float(found.residuals[0]) + 1e-10


def test_the_seed_decides_and_the_global_generator_is_untouched(generator: Seeded) -> None:
    operator = DenseOperator(random_symmetric(20, generator(16)))
    before = torch.get_rng_state()
    first = lanczos(operator, 5, generator=generator(1)).ritz_values
    assert torch.equal(first, lanczos(operator, 5, generator=generator(1)).ritz_values)
    assert not torch.equal(first, lanczos(operator, 5, generator=generator(2)).ritz_values)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(generator: Seeded, steps: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        lanczos(DenseOperator(random_symmetric(5, generator(1))), steps, generator=generator(1))


def test_more_steps_than_dimensions_stop_at_the_dimension(generator: Seeded) -> None:
    found = lanczos(DenseOperator(random_symmetric(5, generator(1))), 50, generator=generator(1))
    assert len(found.ritz_values) == 5


def test_an_unknown_block_lists_the_blocks(generator: Seeded) -> None:
    operator = DenseOperator(random_symmetric(5, generator(1)), {"embedding": 2, "head": 3})
    with pytest.raises(UserError, match="embedding, head"):
        lanczos(operator, 2, generator=generator(1), block="block.7")
