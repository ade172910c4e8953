"""The reference estimator of |A_ij|_F^2 is unbiased, symmetric, and its errors cover the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.estimation.block_norms import block_norms
from tests import oracles
from tests.cases import Case
from tests.operators import DenseOperator, random_symmetric

Seeded = Callable[[int], torch.Generator]
SIZES = {"embedding": 4, "block.0": 11, "block.1": 7, "head": 1}
SEEDS = 300


def runs(operator, samples: int, seeds: int = SEEDS) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN001
    """Returns means and standard errors (seeds, l, l)."""
    found = [
        block_norms(operator, samples, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)
    ]
    return torch.stack([e.mean for e in found]), torch.stack([e.stderr for e in found])


def dense_case(generator: Seeded, seed: int) -> tuple[DenseOperator, torch.Tensor]:
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


@pytest.mark.parametrize("which", ["gauss_newton", "hessian", "residual"])
def test_on_a_decoder_it_agrees_with_the_dense_blocks(
    zoo_case: Callable[[str], Case], generator: Seeded, which: str
) -> None:
    case = zoo_case("decoder_ragged")
    operator = case.hessian() - case.gauss_newton() if which == "residual" else getattr(case, which)()
    truth = oracles.block_fro2(getattr(case.truth, which), case.slices)
    # Judged over seeds, not by one run's own stderr: with few samples that is itself too noisy to divide by.
    means, _ = runs(operator, 8, seeds=24)
    z = (means.mean(0) - truth) / (means.std(0) / 24**0.5)
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
