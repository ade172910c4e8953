"""Norms, traces, gap and cosine of G, H and R from shared probes: centred on the truth, with honest errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.estimation.sampling import Estimate
from hessprobe.estimation.shared_probes import SharedProbes, shared_probes
from tests.cases import Case
from tests.operators import DenseOperator, random_symmetric, with_spectrum

SEEDS, SAMPLES = 300, 12
SIZES = {"embedding": 12, "block.0": 20, "head": 8}
QUANTITIES: dict[str, Callable[[SharedProbes], Estimate]] = {
    "norms": lambda found: found.norms,
    "traces": lambda found: found.traces,
    "gap": lambda found: found.gap,
    "cosine": lambda found: found.cosine,
}


@cache
def pair() -> tuple[Tensor, Tensor]:
    """Returns a positive G of low rank and a smaller indefinite R."""
    generator = torch.Generator().manual_seed(1)
    g = with_spectrum([10.0, 6.0, 3.0, 1.0] + [0.05 * i for i in range(36)], generator)
    return g, 0.15 * random_symmetric(40, generator)


def measured(seed: int, block: str | None = None, samples: int = SAMPLES) -> SharedProbes:
    g, r = (DenseOperator(matrix, SIZES) for matrix in pair())
    return shared_probes(g, r, samples, generator=torch.Generator().manual_seed(seed), block=block)


def truth(block: str | None) -> dict[str, Tensor]:
    g, r = pair()
    where = slice(0, 40) if block is None else {"embedding": slice(0, 12), "block.0": slice(12, 32)}[block]
    g, r = g[where, where], r[where, where]
    h = g + r
    return {
        "norms": torch.stack([a.square().sum() for a in (g, h, r)]),
        "traces": torch.stack([a.trace() for a in (g, h, r)]),
        "gap": r.norm() / g.norm(),
        "cosine": (h * g).sum() / (h.norm() * g.norm()),
    }


@cache
def estimates(quantity: str, block: str | None) -> tuple[Tensor, Tensor]:
    found = [QUANTITIES[quantity](measured(seed, block)) for seed in range(SEEDS)]
    return torch.stack([e.mean for e in found]), torch.stack([e.stderr for e in found])


@pytest.mark.parametrize("block", [None, "block.0"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_is_centred_on_the_truth(quantity, block):
    means, _ = estimates(quantity, block)
    error, stderr = (means.mean(0) - truth(block)[quantity]).abs(), means.std(0) / SEEDS**0.5
    # Ratios keep a bias of second order in 1/12, of which a tenth of one estimate's error is left.
    bias = 0.1 * means.std(0) if quantity in ("gap", "cosine") else 0
    assert bool((error < 3.5 * stderr + bias).all())


@pytest.mark.parametrize("block", [None, "block.0"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_its_error_covers_the_truth_as_often_as_it_says(quantity, block):
    means, stderrs = estimates(quantity, block)
    within = (means - truth(block)[quantity]).abs() <= float(stats.t.ppf(0.975, SAMPLES - 1)) * stderrs
    # Squares are skewed: 4 % allowed for that beside 4 binomial deviations.
    assert float((within.double().mean(0) - 0.95).abs().max()) < 0.04 + 4 * (0.95 * 0.05 / SEEDS) ** 0.5


# -- where tr G is known from elsewhere --------------------------------------------------------------------


@cache
def steadied(block: str | None, samples: int, error: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means and errors of traces from a tr G known with an error of its own, and the probes' own means."""
    found, plain = [], []
    for seed in range(2 * SEEDS):
        probes, generator = measured(seed, block, samples), torch.Generator().manual_seed(10**6 + seed)
        slip = error * torch.randn((), generator=generator, dtype=torch.float64)
        known = Estimate(
            mean=truth(block)["traces"][0] + slip, stderr=torch.tensor(error).double(), samples=9
        )
        found.append(probes.traces_given(known))
        plain.append(probes.traces.mean)
    means, stderrs = torch.stack([e.mean for e in found]), torch.stack([e.stderr for e in found])
    return means, stderrs, torch.stack(plain)


@pytest.mark.parametrize("samples", [2, 6, SAMPLES])
@pytest.mark.parametrize("block", [None, "block.0"])
def test_steadied_traces_are_centred_and_their_errors_honest(block, samples):
    means, stderrs, _ = steadied(block, samples)
    seeds, wanted = len(means), truth(block)["traces"]
    assert bool(((means.mean(0) - wanted).abs() < 3.5 * means.std(0) / seeds**0.5).all())
    # Two samples' errors vary by as much as they are: their mean square is what can be known.
    ratio = stderrs.square().mean(0) / means.var(0)
    tolerance = 4 * (2 / seeds) ** 0.5 * (1.5 if samples == 2 else 1)
    assert float((ratio - 1).abs().max()) < tolerance
    within = (means - wanted).abs() <= float(stats.t.ppf(0.975, samples - 1)) * stderrs
    covered = within.double().mean(0)
    # tr G's error is sure, and Student's quantile too wide for it; H's and R's come from the probes.
    assert float(covered[0]) > 0.95
    assert float((covered[1:] - 0.95).min()) > -4 * (0.95 * 0.05 / seeds) ** 0.5


def test_steadied_traces_are_as_noisy_as_what_is_orthogonal_to_g():
    means, _, plain = steadied(None, SAMPLES)
    g, r = (a - a.diagonal().diag() for a in pair())
    left = r - (r * g).sum() / g.square().sum() * g
    wanted = 2 * float(left.square().sum()) / SAMPLES + 0.4**2
    assert float(means[:, 1].var()) == pytest.approx(wanted, rel=4 * (1 / SEEDS) ** 0.5)
    assert float(means[:, 1].var() / plain[:, 1].var()) < 0.35
    # R's own probes were as good before, and no worse now.
    assert float(means[:, 2].var() / plain[:, 2].var()) < 1.1


def test_a_residual_against_g_does_not_make_the_hessians_trace_noisier():
    """Near initialisation R is larger than H: tr G + tr R would be noisier than the probes of H alone."""
    g, r = pair()
    operators = DenseOperator(g), DenseOperator(r - 0.9 * g)
    known = Estimate(mean=g.trace(), stderr=torch.zeros((), dtype=torch.float64), samples=9)
    found = [shared_probes(*operators, 6, generator=torch.Generator().manual_seed(i)) for i in range(SEEDS)]
    steady = torch.stack([probes.traces_given(known).mean[1] for probes in found]).var()
    plain, split = (
        torch.stack([probes.traces.mean[i] + shift for probes in found]).var()
        for i, shift in ((1, 0.0), (2, known.mean))
    )
    assert float(steady) < 1.1 * float(plain) < 0.5 * float(split)


def test_where_there_is_no_g_the_traces_are_the_probes_own():
    nothing, r = DenseOperator(torch.zeros(40, 40, dtype=torch.float64)), DenseOperator(pair()[1])
    probes = shared_probes(nothing, r, 4, generator=torch.Generator().manual_seed(0))
    known = Estimate(mean=torch.zeros(()).double(), stderr=torch.zeros(()).double(), samples=9)
    torch.testing.assert_close(probes.traces_given(known).mean, probes.traces.mean)
    torch.testing.assert_close(probes.traces_given(known).stderr, probes.traces.stderr)


# -- the probes themselves ---------------------------------------------------------------------------------


def test_every_probe_sees_all_three_matrices():
    found = measured(3)
    g, r = pair()
    torch.testing.assert_close(found.trace[:, 1], found.trace[:, 0] + found.trace[:, 2])
    # |Hv|^2 = |Gv|^2 + 2 Gv.Rv + |Rv|^2, and Hv.Gv shares its middle term.
    middle = found.overlap - found.fro2[:, 0]
    torch.testing.assert_close(found.fro2[:, 1], found.fro2[:, 0] + 2 * middle + found.fro2[:, 2])
    assert found.symmetry_gap < 1e-12
    lopsided = DenseOperator(r + 5 * torch.triu(torch.ones_like(r)))
    crooked = shared_probes(DenseOperator(g), lopsided, 4, generator=torch.Generator().manual_seed(0))
    assert crooked.symmetry_gap > 1e-3


def test_the_ratio_of_shared_probes_is_known_better_than_its_parts():
    """A row's noise is largely common to H and G: their cosine's error is far below that of either norm."""
    found = measured(5, samples=16)
    relative = float(found.norms.stderr[0] / found.norms.mean[0])
    assert float(found.cosine.stderr / found.cosine.mean) < 0.3 * relative


def test_chunks_of_probes_are_the_same_probes():
    g, r = (DenseOperator(matrix, SIZES) for matrix in pair())
    whole = measured(7, samples=5)
    parts = shared_probes(g, r, 5, generator=torch.Generator().manual_seed(7), memory=1)
    torch.testing.assert_close(parts.fro2, whole.fro2)
    assert parts.symmetry_gap < 1e-12
    assert (g.products, r.products) == (5, 5)


def test_equals_the_dense_truth_on_a_decoder(zoo_case: Callable[[str], Case]):
    case = zoo_case("decoder_tied")
    found = shared_probes(
        case.gauss_newton(),
        case.hessian() - case.gauss_newton(),
        8,
        generator=torch.Generator().manual_seed(2),
    )
    wanted = torch.stack(
        [a.trace() for a in (case.truth.gauss_newton, case.truth.hessian, case.truth.residual)]
    )
    assert (
        float(((found.traces.mean - wanted) / found.traces.stderr).abs().max()) < 4.5
    )  # 8 samples: t with 7


@pytest.mark.parametrize(("samples", "block", "said"), [(1, None, "at least 2"), (4, "block.7", "embedding")])
def test_bad_input_is_refused(samples, block, said):
    with pytest.raises(UserError, match=said):
        measured(0, block, samples)
