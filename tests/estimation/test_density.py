"""Spectral densities match prescribed spectra, integrate to one, and keep to the quadrature's own identities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hessprobe as hp
from hessprobe.errors import UserError
from hessprobe.estimation.density import SpectralDensity, spectral_density, starts_at_once
from hessprobe.estimation.lanczos import lanczos_runs
from tests.cases import Case
from tests.operators import DenseOperator, random_symmetric, with_spectrum

Seeded = Callable[[int], torch.Generator]
SPECTRA = {
    "two clusters": [0.0] * 150 + [1.0] * 50,
    "indefinite": [-2.0] * 40 + [0.0] * 100 + [3.0] * 60,
    "semicircle": [float(x) for x in torch.linspace(-0.999, 0.999, 200)],
}


def density_of(spectrum: str, generator: Seeded, steps: int = 30, probes: int = 8) -> SpectralDensity:
    operator = DenseOperator(with_spectrum(SPECTRA[spectrum], generator(1)))
    return spectral_density(operator, steps, probes, generator=generator(2))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_weights_sum_to_one_and_the_density_integrates_to_one(generator: Seeded, spectrum: str) -> None:
    found = density_of(spectrum, generator)
    torch.testing.assert_close(found.weights.nansum(1), torch.ones(8, dtype=torch.float64))
    axis = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    integral = torch.trapezoid(found.smoothed(axis, 0.1), axis)
    torch.testing.assert_close(integral, torch.ones(8, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spectrum", ["two clusters", "indefinite"])
def test_finds_the_values_and_shares_of_clusters(generator: Seeded, spectrum: str) -> None:
    """A spectrum of c values has a Krylov space of c dimensions: the nodes are exact, the weights random."""
    found, eigenvalues = density_of(spectrum, generator), torch.tensor(SPECTRA[spectrum])
    values, counts = eigenvalues.unique(return_counts=True)
    c = len(values)
    assert bool(found.nodes[:, c:].isnan().all()) and bool(found.weights[:, c:].isnan().all())
    assert float((found.nodes[:, :c] - values).abs().max()) < 1e-9
    assert float(found.residuals[:, :c].max()) < 1e-9
    shares = counts / len(eigenvalues)
    error = (found.weights[:, :c].mean(0) - shares) / (found.weights[:, :c].std(0) / 8**0.5)
    assert float(error.abs().max()) < 5  # t with 7 degrees of freedom
    assert found.products == 8 * c


def test_the_mean_over_starts_is_the_share_of_eigenvalues_below_any_value(generator: Seeded) -> None:
    found = density_of("semicircle", generator, steps=40, probes=16)
    eigenvalues = torch.tensor(SPECTRA["semicircle"])
    for value in (-0.5, 0.0, 0.7):
        share, below = float((eigenvalues < value).double().mean()), found.mass_below(value)
        # One node's weight, a fortieth, may lie on either side.
        assert abs(float(below.mean()) - share) < 3 * float(below.std()) / 4 + 1 / 40


def test_moments_are_those_of_the_starts(generator: Seeded) -> None:
    """sum_i w_i node_i^q averages to tr A^q / p (Ubaru, Chen, Saad 2017)."""
    matrix = random_symmetric(40, generator(3)) / 5
    found = spectral_density(DenseOperator(matrix), 8, 200, generator=generator(4))
    power = matrix
    for q in (1, 2, 3, 4):
        each = (found.weights * found.nodes**q).sum(1)
        assert abs(float(each.mean() - power.trace() / 40)) < 3.5 * float(each.std()) / 200**0.5 + 1e-12, q
        power = power @ matrix


def test_starts_together_are_starts_one_by_one(generator: Seeded) -> None:
    operator = DenseOperator(with_spectrum(SPECTRA["semicircle"], generator(1)))
    together = spectral_density(operator, 12, 5, generator=generator(2))
    assert operator.products == together.products == 60
    apart = spectral_density(operator, 12, 5, generator=generator(2), memory=1)
    torch.testing.assert_close(together.nodes, apart.nodes, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(together.leading.abs(), apart.leading.abs(), rtol=1e-7, atol=1e-9)


def test_a_start_whose_space_ends_early_leaves_the_others_going(generator: Seeded) -> None:
    matrix = with_spectrum([float(i) for i in range(30)], generator(5))
    vectors = torch.linalg.eigh(matrix).eigenvectors
    starts = torch.stack([vectors[:, 3] + vectors[:, 20], torch.ones(30, dtype=torch.float64)])
    operator = DenseOperator(matrix)
    short, long = lanczos_runs(operator, 10, starts=starts)
    assert len(short.ritz_values) == 2 and len(long.ritz_values) == 10
    torch.testing.assert_close(short.ritz_values, torch.tensor([3.0, 20.0], dtype=torch.float64))
    assert operator.products == 12


def test_extremes_and_the_leading_vector(generator: Seeded) -> None:
    matrix = with_spectrum([100.0, -40.0] + [0.01 * i for i in range(58)], generator(6))
    found = spectral_density(DenseOperator(matrix), 14, 3, generator=generator(7))
    for largest, wanted in ((True, 100.0), (False, -40.0)):
        value, residual = found.extreme(largest)
        assert value == pytest.approx(wanted, rel=1e-9)
        assert 0 <= residual < 1e-4
    v = found.leading
    assert float(v.norm()) == pytest.approx(1)
    assert float((matrix @ v - 100 * v).norm()) < 1e-4


def test_a_blocks_density_is_that_of_the_block_alone(generator: Seeded) -> None:
    matrix = random_symmetric(23, generator(8))
    operator = DenseOperator(matrix, {"embedding": 6, "block.0": 12, "head": 5})
    found = spectral_density(operator, 20, 2, generator=generator(9), block="block.0")
    eigenvalues = torch.linalg.eigvalsh(matrix[6:18, 6:18])
    torch.testing.assert_close(found.nodes[:, :12], eigenvalues.expand(2, 12), rtol=1e-9, atol=1e-9)
    assert bool(found.nodes[:, 12:].isnan().all()) and found.leading.shape == (12,)


@pytest.mark.parametrize("which", ["gauss_newton", "hessian"])
def test_of_a_decoders_matrices(zoo_case: Callable[[str], Case], generator: Seeded, which: str) -> None:
    case = zoo_case("decoder_tied")
    found = hp.spectral_density(getattr(case, which)(), 15, 3, generator=generator(10))
    eigenvalues = torch.linalg.eigvalsh(getattr(case.truth, which))
    distance = (found.nodes[..., None] - eigenvalues).abs().amin(-1)
    assert bool((distance <= found.residuals + 1e-10 * eigenvalues.abs().max()).all())
    first = (found.nodes * found.weights).sum(1)
    assert abs(float(first.mean() - eigenvalues.mean())) < 6 * float(first.std()) / 3**0.5


def test_the_seed_decides_and_the_global_generator_is_untouched(generator: Seeded) -> None:
    before = torch.get_rng_state()
    nodes = [
        density_of("semicircle", generator, 5, 2).nodes,
        density_of("semicircle", generator, 5, 2).nodes,
    ]
    assert torch.equal(*nodes)
    operator = DenseOperator(with_spectrum(SPECTRA["semicircle"], generator(1)))
    assert not torch.equal(spectral_density(operator, 5, 2, generator=generator(3)).nodes, nodes[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_bounds_how_many_starts_go_together() -> None:
    assert starts_at_once(8, 10, 1000, 25_000) == 2
    assert starts_at_once(8, 10, 1000, 5_000) == 1
    assert starts_at_once(3, 10, 1000, 2**30) == 3


@pytest.mark.parametrize(("steps", "probes"), [(0, 1), (3, 0)])
def test_no_steps_or_probes_are_refused(generator: Seeded, steps: int, probes: int) -> None:
    with pytest.raises(UserError, match=f"at least 1, got {steps} and {probes}"):
        spectral_density(
            DenseOperator(random_symmetric(5, generator(1))), steps, probes, generator=generator(1)
        )


def test_an_unknown_block_lists_the_blocks(generator: Seeded) -> None:
    operator = DenseOperator(random_symmetric(5, generator(1)), {"embedding": 2, "head": 3})
    with pytest.raises(UserError, match="embedding, head"):
        spectral_density(operator, 2, 1, generator=generator(1), block="block.7")


def test_a_product_that_is_not_finite_is_said(generator: Seeded) -> None:
    matrix = random_symmetric(5, generator(1))
    matrix[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="product 1 with the matrix is not finite"):
        spectral_density(DenseOperator(matrix), 3, 1, generator=generator(1))
