"""Random signs come from the generator that is handed in and from nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats

from hessprobe.errors import UserError
from hessprobe.estimation.sampling import Estimate, log_interval, rademacher

Seeded = Callable[[int], torch.Generator]


def test_draws_are_plus_or_minus_one_in_the_asked_shape_and_type(generator: Seeded) -> None:
    for dtype in (torch.float32, torch.float64):
        signs = rademacher(5, 70, generator=generator(1), dtype=dtype, device=torch.device("cpu"))
        assert signs.shape == (5, 70)
        assert signs.dtype == dtype
        assert torch.equal(signs.abs(), torch.ones_like(signs))
        assert len(signs.unique()) == 2


def test_the_same_seed_draws_the_same_and_another_seed_does_not(generator: Seeded) -> None:
    def draw(seed: int) -> torch.Tensor:
        return rademacher(4, 64, generator=generator(seed), dtype=torch.float64, device=torch.device("cpu"))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_successive_draws_of_one_generator_differ(generator: Seeded) -> None:
    source = generator(1)
    first = rademacher(4, 64, generator=source, dtype=torch.float64, device=torch.device("cpu"))
    assert not torch.equal(
        first, rademacher(4, 64, generator=source, dtype=torch.float64, device=torch.device("cpu"))
    )


def test_the_global_generator_is_untouched(generator: Seeded) -> None:
    before = torch.get_rng_state()
    rademacher(4, 64, generator=generator(1), dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_is_required() -> None:
    with pytest.raises(TypeError, match="generator"):
        rademacher(4, 64, dtype=torch.float64, device=torch.device("cpu"))  # type: ignore[call-arg]


def test_signs_are_fair_and_uncorrelated(generator: Seeded) -> None:
    k, p = 4000, 12
    signs = rademacher(k, p, generator=generator(7), dtype=torch.float64, device=torch.device("cpu"))
    # Sums of k independent signs have standard deviation sqrt(k): 12 means and 66 pairs, none beyond 4.5.
    z_means = signs.sum(0) / k**0.5
    z_pairs = (signs.T @ signs)[*torch.triu_indices(p, p, 1)] / k**0.5
    z_successive = (signs[1:] * signs[:-1]).sum(0) / (k - 1) ** 0.5
    for z in (z_means, z_pairs, z_successive):
        assert z.abs().max() < 4.5


# -- estimates ---------------------------------------------------------------------------------------------


def test_an_estimate_is_mean_and_standard_error_of_independent_samples() -> None:
    found = Estimate.of(torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0], [7.0, 2.0]], dtype=torch.float64))
    assert found.samples == 4
    assert found.mean.tolist() == [4.0, 2.0]
    assert found.stderr[0] == pytest.approx((20 / 3 / 4) ** 0.5)
    assert found.stderr[1] == 0


def test_one_sample_has_no_standard_error() -> None:
    for make in (Estimate.of, lambda samples: Estimate.jackknife(samples, torch.square)):
        with pytest.raises(UserError, match="at least 2"):
            make(torch.ones(1, 3))


def test_the_jackknife_of_a_mean_is_the_mean_and_its_standard_error(generator: Seeded) -> None:
    samples = torch.randn(9, 4, generator=generator(1), dtype=torch.float64)
    plain, jackknifed = Estimate.of(samples), Estimate.jackknife(samples, lambda mean: mean)
    assert torch.allclose(plain.mean, jackknifed.mean)
    assert torch.allclose(plain.stderr, jackknifed.stderr)


def test_the_jackknife_of_a_square_is_the_mean_over_pairs_of_different_samples(generator: Seeded) -> None:
    # sum_{i != j} x_i x_j / (k (k - 1)) is the unbiased estimate of a squared mean.
    x = torch.randn(7, generator=generator(2), dtype=torch.float64)
    unbiased = (x.sum() ** 2 - x.square().sum()) / (7 * 6)
    assert float(Estimate.jackknife(x, torch.square).mean) == pytest.approx(float(unbiased))


def test_the_jackknife_of_a_ratio_loses_the_bias_and_covers_the_truth(generator: Seeded) -> None:
    seeds, k, ratio = 2000, 16, 0.5
    draws = torch.randn(seeds, k, 2, generator=generator(3), dtype=torch.float64)
    samples = torch.tensor([1.0, 2.0], dtype=torch.float64) + draws * torch.tensor(
        [1.0, 1.5], dtype=torch.float64
    )
    means = samples.mean(1)
    plain = means[:, 0] / means[:, 1] - ratio
    found = [Estimate.jackknife(s, lambda mean: mean[..., 0] / mean[..., 1]) for s in samples]
    errors = torch.stack([e.mean for e in found]) - ratio
    z_plain = float(plain.mean() / plain.std()) * seeds**0.5
    z_jackknife = float(errors.mean() / errors.std()) * seeds**0.5
    assert z_plain > 4 > abs(z_jackknife), "first-order bias is visible without, and gone with"
    stderrs = torch.stack([e.stderr for e in found])
    covered = float((errors.abs() < float(stats.t.ppf(0.975, k - 1)) * stderrs).double().mean())
    # 1 % allowed for the ratio's skewness beside 4 binomial deviations.
    assert abs(covered - 0.95) < 0.01 + 4 * (0.95 * 0.05 / seeds) ** 0.5


def test_log_intervals_are_students_on_the_logarithm_and_symmetric_where_there_is_none():
    mean, stderr = torch.tensor([4.0, 4.0, -1.0]).double(), torch.tensor([1.0, 1.0, 0.5]).double()
    low, high = log_interval(mean, stderr, torch.tensor([3.0, 1e9, 3.0]), level=0.9)
    t3, normal = stats.t.ppf(0.95, 3), stats.norm.ppf(0.95)
    torch.testing.assert_close((low * high)[:2].sqrt(), mean[:2])
    assert float((high[0] / mean[0]).log()) == pytest.approx(t3 / 4)
    assert float((high[1] / mean[1]).log()) == pytest.approx(normal / 4, rel=1e-6)
    assert (float(low[2]), float(high[2])) == pytest.approx((-1 - 0.5 * t3, -1 + 0.5 * t3))


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(UserError, match="between 0 and 1"):
        log_interval(torch.ones(1), torch.ones(1), 3.0, level)
