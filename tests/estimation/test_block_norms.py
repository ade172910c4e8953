"""The reference estimator of |A_ij|_F^2 is unbiased, symmetric, and its errors cover the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.estimation.block_norms import (
    block_norm_samples,
    block_norms,
    coupling_of,
    off_block_energy_of,
    symmetry_gap,
)
from tests import oracles
from tests.cases import Case, pair
from tests.operators import DenseOperator, random_symmetric, with_spectrum

Seeded = Callable[[int], torch.Generator]
SIZES = {"embedding": 4, "block.0": 11, "block.1": 7, "head": 1}
SEEDS = 300


def runs(operator: CurvatureOperator, samples: int, seeds: int = SEEDS) -> tuple[Tensor, Tensor]:
    """Returns means and standard errors (seeds, l, l)."""
    found = [
        block_norms(operator, samples, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)
    ]
    return torch.stack([e.mean for e in found]), torch.stack([e.stderr for e in found])


def dense_case(generator: Seeded, seed: int) -> tuple[DenseOperator, Tensor]:
    operator = DenseOperator(random_symmetric(sum(SIZES.values()), generator(seed)), SIZES)
    return operator, oracles.block_fro2(operator.matrix, list(operator.partition.slices.values()))


def test_every_pair_of_blocks_is_unbiased(generator: Seeded) -> None:
    operator, truth = dense_case(generator, 1)
    means, _ = runs(operator, 6)
    z = (means.mean(0) - truth) / (means.std(0) / SEEDS**0.5).clamp(min=1e-9 * float(truth.max()))
    assert z.abs().max() < 4.5


def test_the_stderr_is_the_spread_over_seeds(generator: Seeded) -> None:
    operator, _ = dense_case(generator, 2)
    means, stderrs = runs(operator, 12)
    spread, claimed = means.var(0), stderrs.square().mean(0)
    exact = spread < 1e-18 * means.mean(0).square()
    assert claimed[exact].max() < 1e-18 * means.square().max() if exact.any() else True
    # Sample variances over 300 seeds are off by sqrt((kurtosis - 1) / 300): about 10 % with these tails.
    assert ((claimed / spread)[~exact] - 1).abs().max() < 0.4


def test_the_truth_is_covered_as_often_as_the_stderr_says(generator: Seeded) -> None:
    operator, truth = dense_case(generator, 3)
    samples = 64  # enough for the mean of squares to look normal
    means, stderrs = runs(operator, samples)
    covered = ((means - truth).abs() < 1.96 * stderrs).double().mean(0)
    inexact = stderrs.mean(0) > 1e-9 * truth
    # Means of squares are skewed to the right: 3 % allowed for that beside 4 binomial deviations.
    assert (covered[inexact] - 0.95).abs().max() < 0.03 + 4 * (0.95 * 0.05 / SEEDS) ** 0.5


def test_the_error_falls_as_one_over_the_root_of_samples(generator: Seeded) -> None:
    operator, _ = dense_case(generator, 4)
    few, many = runs(operator, 8, seeds=100)[1], runs(operator, 128, seeds=100)[1]
    ratio = float(few.square().mean(0).sum() / many.square().mean(0).sum())
    assert ratio == pytest.approx(16, rel=0.25)


def test_is_symmetric_in_its_two_blocks(generator: Seeded) -> None:
    operator, _ = dense_case(generator, 5)
    found = block_norms(operator, 4, generator=generator(1))
    assert found.mean.shape == found.stderr.shape == (4, 4)
    assert torch.equal(found.mean, found.mean.T)
    assert torch.equal(found.stderr, found.stderr.T)


@pytest.mark.parametrize(
    ("name", "which"),
    [("decoder_ragged", "gauss_newton"), ("repeated_module", "hessian"), ("repeated_module", "residual")],
)
def test_on_a_model_it_agrees_with_the_dense_blocks(
    zoo_case: Callable[[str], Case], name: str, which: str
) -> None:
    case = zoo_case(name)
    operator, dense = pair(case, which)
    truth = oracles.block_fro2(dense, case.slices)
    # Judged over seeds, not by one run's own stderr: with few samples that is itself too noisy to divide by.
    means, _ = runs(operator, 8, seeds=24)
    # Blocks of R that vanish (a last layer is linear) hold rounding alone, which no z-score should judge.
    z = (means.mean(0) - truth) / (means.std(0) / 24**0.5).clamp(min=1e-12 * float(truth.max()))
    assert z.abs().max() < 4.5


def test_block_diagonal_has_no_norm_off_its_diagonal(
    zoo_case: Callable[[str], Case], generator: Seeded
) -> None:
    case = zoo_case("decoder_ragged")
    found = block_norms(case.gauss_newton().block_diagonal(), 2, generator=generator(1)).mean
    assert not (found - torch.diag(found.diagonal())).any()
    assert (found.diagonal() > 0).all()


def test_the_seed_decides_and_the_global_generator_is_untouched(generator: Seeded) -> None:
    operator, _ = dense_case(generator, 6)
    before = torch.get_rng_state()
    first = block_norms(operator, 4, generator=generator(1))
    assert torch.equal(first.mean, block_norms(operator, 4, generator=generator(1)).mean)
    assert not torch.equal(first.mean, block_norms(operator, 4, generator=generator(2)).mean)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("samples", [1, 0])
def test_too_few_samples_for_a_standard_error_are_refused(generator: Seeded, samples: int) -> None:
    operator, _ = dense_case(generator, 7)
    with pytest.raises(UserError, match="at least 2"):
        block_norms(operator, samples, generator=generator(1))


def test_samples_are_what_the_estimate_averages(generator: Seeded) -> None:
    operator, _ = dense_case(generator, 8)
    samples = block_norm_samples(operator, 5, generator=generator(1))
    found = block_norms(operator, 5, generator=generator(1))
    assert samples.shape == (5, 4, 4)
    assert torch.allclose(samples.mean(0), found.mean)
    assert torch.allclose(samples.std(0) / 5**0.5, found.stderr)
    assert operator.products == 2 * 5 * 4, "one product a sample and block, and no more"


def test_coupling_and_off_block_energy_of_the_truth(generator: Seeded) -> None:
    operator, truth = dense_case(generator, 9)
    slices = list(operator.partition.slices.values())
    assert torch.allclose(coupling_of(truth), oracles.coupling(operator.matrix, slices))
    between = operator.matrix - oracles.block_diagonal(operator.matrix, slices)
    share = float(between.square().sum() / operator.matrix.square().sum())
    assert float(off_block_energy_of(truth)) == pytest.approx(share)
    assert float(off_block_energy_of(torch.diag(truth.diagonal()))) == pytest.approx(0)


def test_coupling_of_a_positive_semidefinite_matrix_is_at_most_one(generator: Seeded) -> None:
    matrix = with_spectrum([1.0] + [0.0] * 22, generator(10))  # rank one: every pair fully coupled
    operator = DenseOperator(matrix, SIZES)
    coupling = coupling_of(oracles.block_fro2(matrix, list(operator.partition.slices.values())))
    assert torch.allclose(coupling, torch.ones(4, 4, dtype=torch.float64))


def test_symmetry_gap_tells_a_wrong_operator_from_rounding(
    zoo_case: Callable[[str], Case], generator: Seeded
) -> None:
    assert symmetry_gap(zoo_case("layernorm").hessian(), generator=generator(1)) < 1e-14
    wrong = random_symmetric(23, generator(2))
    wrong[0, 5] += 1.0
    assert symmetry_gap(DenseOperator(wrong), generator=generator(1)) > 1e-3
