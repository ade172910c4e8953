"""tr H from a known tr G and probes of R, or of H where that is smaller: centred on the truth, with honest errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from scipy import stats
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.estimation.hessian_trace import hessian_trace
from hessprobe.estimation.sampling import Estimate
from hessprobe.estimation.trace import hutchinson_trace
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.verification import verified_plan
from tests.cases import Case
from tests.models import seeded
from tests.operators import DenseOperator, random_symmetric, with_spectrum

SEEDS, SAMPLES, ERROR = 600, 8, 1.0
# How large R is beside G, and how much of it is -G: the last is a coin's toss for the probe that decides.
WORLDS = {"small residual": (0.1, 0.0), "large residual": (0.1, 0.9), "as large as the Hessian": (0.1, 0.5)}


@cache
def matrices(world: str) -> tuple[Tensor, Tensor]:
    generator, (noise, against) = seeded(1), WORLDS[world]
    g = with_spectrum([10.0, 6.0, 3.0, 1.0] + [0.05 * i for i in range(36)], generator)
    return g, noise * random_symmetric(40, generator) - against * g


def measured(world: str, seed: int, samples: int = SAMPLES) -> tuple[Estimate, list[int]]:
    """Returns the estimate and the products that G, H and R took; tr G is known with an error of its own."""
    g, r = matrices(world)
    generator = seeded(seed)
    slip = ERROR * torch.randn((), generator=generator, dtype=torch.float64)
    known = Estimate(mean=g.trace() + slip, stderr=torch.tensor(ERROR), samples=32)
    operators = [DenseOperator(a) for a in (g, g + r, r)]
    found = hessian_trace(*operators, samples, known=lambda: known, generator=generator)
    return found, [operator.products for operator in operators]


@cache
def estimates(world: str) -> tuple[Tensor, Tensor]:
    found = [measured(world, seed)[0] for seed in range(SEEDS)]
    return torch.stack([e.mean for e in found]), torch.stack([e.stderr for e in found])


def off_diagonal(a: Tensor) -> float:
    return float(a.square().sum() - a.diagonal().square().sum())


@pytest.mark.parametrize("world", WORLDS)
def test_is_centred_on_the_truth(world):
    means, _ = estimates(world)
    error = float(means.mean() - sum(matrices(world)).trace())
    assert abs(error) < 3.5 * float(means.std()) / SEEDS**0.5


@pytest.mark.parametrize("world", WORLDS)
def test_its_error_covers_the_truth_as_often_as_it_says(world):
    means, stderrs = estimates(world)
    within = (means - sum(matrices(world)).trace()).abs() <= float(stats.t.ppf(0.975, SAMPLES - 1)) * stderrs
    # The known part's error is sure, so Student's quantile is cautious for the sum: up to 2.5 % beside 4 binomial errors.
    covered, binomial = float(within.double().mean()), (0.95 * 0.05 / SEEDS) ** 0.5
    assert 0.95 - 4 * binomial < covered < 0.975 + 4 * binomial


@pytest.mark.parametrize(("world", "chosen"), [("small residual", 2), ("large residual", 1)])
def test_the_smaller_matrix_is_probed_and_has_the_variance_theory_gives(world, chosen):
    g, r = matrices(world)
    means, _ = estimates(world)
    known = ERROR**2 if chosen == 2 else 0.0
    wanted = 2 * off_diagonal((g + r, r)[chosen - 1]) / SAMPLES + known
    # The sample variance of nearly normal numbers is off by sqrt(2 / (n - 1)) of itself.
    assert abs(float(means.var()) / wanted - 1) < 4 * (2 / (SEEDS - 1)) ** 0.5
    products = [1, 0, 1]
    products[chosen] += SAMPLES
    assert all(measured(world, seed)[1] == products for seed in range(20))


def test_a_toss_up_is_decided_by_the_probe_that_is_not_used():
    """Both ways are taken, and the mean over seeds above is the trace all the same."""
    assert {measured("as large as the Hessian", seed)[1][2] for seed in range(60)} == {1, 1 + SAMPLES}


def test_what_is_not_needed_is_not_asked_for():
    g, r = matrices("large residual")
    operators = [DenseOperator(a) for a in (g, g + r, r)]
    hessian_trace(*operators, 2, known=lambda: pytest.fail("tr G is of no use here"), generator=seeded(0))


def test_fewer_probes_do_than_of_the_hessian():
    g, r = matrices("small residual")
    plain = torch.stack(
        [hutchinson_trace(DenseOperator(g + r), SAMPLES, generator=seeded(seed)).mean for seed in range(200)]
    )
    assert float(estimates("small residual")[0].var() / plain.var()) < 0.3


@pytest.mark.parametrize("name", ["decoder", "decoder_swiglu_layernorm", "decoder_tied"])
def test_with_layer_kernels_on_real_models(name: str, zoo_case: Callable[[str], Case]) -> None:
    """Whichever way is taken: with the kernels' trace of G, errors are what the estimates really spread by."""
    case, seeds, rounds = zoo_case(name), 80, 4
    batches = case.problem.batches
    plan = verified_plan(case.objective, batches, case.partition)
    truth, found = case.truth, []
    for seed in range(seeds):
        kernels = layer_kernels(
            case.objective,
            batches,
            case.partition,
            rounds=rounds,
            generator=seeded(seed),
            cotangent="sign",
            plan=plan,
        )
        operators = [DenseOperator(a) for a in (truth.gauss_newton, truth.hessian, truth.residual)]
        trace = partial(kernels.trace, "batch", whole=True)
        found.append(hessian_trace(*operators, SAMPLES, known=trace, generator=seeded(10**6 + seed)))
    means, stderrs = (torch.stack([getattr(e, kind) for e in found]) for kind in ("mean", "stderr"))
    assert abs(float(means.mean() - truth.hessian.trace())) < 3.5 * float(means.std()) / seeds**0.5
    within = (means - truth.hessian.trace()).abs() <= float(stats.t.ppf(0.975, SAMPLES - 1)) * stderrs
    # Two sequences' squares are skewed: 4 % allowed for that beside 4 binomial errors.
    assert abs(float(within.double().mean()) - 0.95) < 0.04 + 4 * (0.95 * 0.05 / seeds) ** 0.5


def test_with_the_models_own_products(zoo_case: Callable[[str], Case]) -> None:
    from hessprobe.curvature.residual import Residual

    case = zoo_case("layernorm")
    known = Estimate(mean=case.truth.gauss_newton.trace(), stderr=torch.zeros(()), samples=1)
    residual = Residual(case.objective, case.problem.batches, case.partition)
    found = hessian_trace(
        case.gauss_newton(), case.hessian(), residual, 24, known=lambda: known, generator=seeded(0)
    )
    assert abs(float(found.mean - case.truth.hessian.trace())) < 4 * float(found.stderr)


def test_it_is_exact_where_nothing_is_left_of_the_residual():
    g = matrices("small residual")[0]
    known = Estimate(mean=g.trace(), stderr=torch.zeros(()), samples=1)
    operators = DenseOperator(g), DenseOperator(g), DenseOperator(torch.zeros_like(g))
    found = hessian_trace(*operators, 2, known=lambda: known, generator=seeded(0))
    assert float(found.mean) == pytest.approx(float(g.trace())) and float(found.stderr) == 0


@pytest.mark.parametrize("samples", [1, 0])
def test_too_few_samples_for_a_standard_error_are_refused(samples):
    with pytest.raises(UserError, match="at least 2"):
        measured("small residual", 0, samples)
