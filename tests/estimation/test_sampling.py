"""Random signs come from the generator that is handed in and from nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hessprobe.estimation.sampling import rademacher

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
