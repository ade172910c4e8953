"""Trace estimates are centred on the trace, and their standard errors are neither optimistic nor timid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hessprobe.errors import UserError
from hessprobe.estimation.trace import hutchinson_trace, hutchpp_trace, xtrace
from tests.cases import Case
from tests.operators import DenseOperator, random_symmetric, with_spectrum

Seeded = Callable[[int], torch.Generator]
ESTIMATORS = {"hutchinson": hutchinson_trace, "hutchpp": hutchpp_trace, "xtrace": xtrace}
SEEDS = 400


def runs(
    estimator: Callable[..., Any], operator: Any, samples: int, seeds: int = SEEDS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns means and standard errors of the estimator over consecutive seeds."""
    found = [
        estimator(operator, samples, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)
    ]
    return np.array([float(e.mean) for e in found]), np.array([float(e.stderr) for e in found])


def test_hutchinson_is_unbiased_with_the_variance_theory_gives(generator: Seeded) -> None:
    matrix, samples = random_symmetric(30, generator(1)), 16
    means, _ = runs(hutchinson_trace, DenseOperator(matrix), samples)
    # Var = 2 (|A|_F^2 - sum_i A_ii^2) / samples for Rademacher probes (Hutchinson 1989).
    variance = float(2 * (matrix.square().sum() - matrix.diagonal().square().sum())) / samples
    assert abs(means.mean() - float(matrix.trace())) < 4 * (variance / SEEDS) ** 0.5
    # The sample variance of nearly normal numbers is off by sqrt(2 / (n - 1)) of itself.
    assert abs(means.var(ddof=1) / variance - 1) < 4 * (2 / (SEEDS - 1)) ** 0.5


def test_hutchinson_stderr_covers_the_trace_as_often_as_it_says(generator: Seeded) -> None:
    matrix, samples = random_symmetric(30, generator(2)), 16
    means, stderrs = runs(hutchinson_trace, DenseOperator(matrix), samples)
    covered = (np.abs(means - float(matrix.trace())) < stats.t.ppf(0.975, samples - 1) * stderrs).mean()
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / SEEDS) ** 0.5


def test_hutchinson_stderr_falls_as_one_over_the_root_of_samples(generator: Seeded) -> None:
    operator = DenseOperator(random_symmetric(30, generator(3)))
    samples = np.array([8, 32, 128])
    variances = [(runs(hutchinson_trace, operator, int(n), seeds=100)[1] ** 2).mean() for n in samples]
    slope = np.polyfit(np.log(samples), np.log(variances), 1)[0]
    # Each log variance carries sqrt(2 / (n - 1) / 100) of noise, 5 % at n = 8, over a baseline of log 16.
    assert slope == pytest.approx(-1, abs=0.08)


def test_hutchinson_is_exact_on_a_diagonal_matrix(generator: Seeded) -> None:
    operator = DenseOperator(torch.diag(torch.arange(10.0, dtype=torch.float64)))
    found = hutchinson_trace(operator, 4, generator=generator(1))
    assert float(found.mean) == pytest.approx(45)
    assert float(found.stderr) == pytest.approx(0, abs=1e-12)


def test_hutchinson_on_the_gauss_newton_matrix_of_a_decoder(
    zoo_case: Callable[[str], Case], generator: Seeded
) -> None:
    case = zoo_case("decoder_ragged")
    found = hutchinson_trace(case.gauss_newton(), 64, generator=generator(5))
    assert found.samples == 64
    assert abs(float(found.mean - case.truth.gauss_newton.trace())) < 4 * float(found.stderr)


@pytest.mark.parametrize("name", ["hutchpp", "xtrace"])
@pytest.mark.parametrize("kind", ["indefinite", "decaying"])
def test_low_rank_estimators_are_unbiased(generator: Seeded, name: str, kind: str) -> None:
    matrix = (
        random_symmetric(30, generator(4))
        if kind == "indefinite"
        else with_spectrum([float(2.0**-i) for i in range(30)], generator(4))
    )
    means, _ = runs(ESTIMATORS[name], DenseOperator(matrix), 12)
    z = (means.mean() - float(matrix.trace())) / (means.std(ddof=1) / SEEDS**0.5)
    assert abs(z) < 4


@pytest.mark.parametrize("name", ["hutchpp", "xtrace"])
def test_low_rank_estimators_beat_hutchinson_where_the_spectrum_decays(generator: Seeded, name: str) -> None:
    operator = DenseOperator(with_spectrum([float(2.0**-i) for i in range(30)], generator(5)))
    plain, _ = runs(hutchinson_trace, operator, 12, seeds=50)
    deflated, _ = runs(ESTIMATORS[name], operator, 12, seeds=50)
    assert deflated.std() < 0.2 * plain.std()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_products_and_independent_samples_are_counted_honestly(generator: Seeded, name: str) -> None:
    operator = DenseOperator(random_symmetric(30, generator(6)))
    if name == "hutchinson":
        found, products, samples = hutchinson_trace(operator, 12, generator=generator(1)), 12, 12
    else:
        found = ESTIMATORS[name](operator, 12, repetitions=5, generator=generator(1))
        products, samples = 60, 5
    assert (operator.products, found.samples) == (products, samples)


@pytest.mark.parametrize("name", ["hutchpp", "xtrace"])
def test_repetitions_give_low_rank_estimators_an_honest_error(generator: Seeded, name: str) -> None:
    matrix, repetitions = with_spectrum([float(2.0**-i) for i in range(30)], generator(7)), 6
    seeds = 150
    found = [
        ESTIMATORS[name](DenseOperator(matrix), 6, repetitions=repetitions, generator=generator(seed))
        for seed in range(seeds)
    ]
    means = np.array([float(e.mean) for e in found])
    stderrs = np.array([float(e.stderr) for e in found])
    covered = (np.abs(means - float(matrix.trace())) < stats.t.ppf(0.975, repetitions - 1) * stderrs).mean()
    # The errors of six repetitions are not quite normal: 2 % allowed for that beside 4 binomial deviations.
    assert abs(covered - 0.95) < 0.02 + 4 * (0.95 * 0.05 / seeds) ** 0.5


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_seed_decides_and_the_global_generator_is_untouched(generator: Seeded, name: str) -> None:
    operator = DenseOperator(random_symmetric(30, generator(6)))
    before = torch.get_rng_state()
    first = ESTIMATORS[name](operator, 12, generator=generator(1))
    again = ESTIMATORS[name](operator, 12, generator=generator(1))
    other = ESTIMATORS[name](operator, 12, generator=generator(2))
    assert float(first.mean) == float(again.mean) != float(other.mean)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("samples", [1, 0, -3])
def test_too_few_samples_for_a_standard_error_are_refused(generator: Seeded, samples: int) -> None:
    with pytest.raises(UserError, match="at least 2"):
        hutchinson_trace(DenseOperator(random_symmetric(5, generator(1))), samples, generator=generator(1))
    for estimator in (hutchpp_trace, xtrace):
        with pytest.raises(UserError, match="at least 2"):
            operator = DenseOperator(random_symmetric(30, generator(1)))
            estimator(operator, 6, repetitions=samples, generator=generator(1))


@pytest.mark.parametrize(("name", "samples"), [("hutchpp", 4), ("hutchpp", 0), ("xtrace", 5), ("xtrace", 0)])
def test_products_that_do_not_split_evenly_are_refused(generator: Seeded, name: str, samples: int) -> None:
    with pytest.raises(UserError, match=f"positive.*got {samples}"):
        ESTIMATORS[name](DenseOperator(random_symmetric(30, generator(1))), samples, generator=generator(1))


@pytest.mark.parametrize("name", ["hutchpp", "xtrace"])
def test_more_products_than_the_matrix_has_rows_are_refused(generator: Seeded, name: str) -> None:
    with pytest.raises(UserError):
        ESTIMATORS[name](DenseOperator(random_symmetric(5, generator(1))), 12, generator=generator(1))
