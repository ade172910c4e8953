"""A ratio from a few seeds: the tests' own formulas, scipy's t, and intervals that hold the truth as often as said."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hessprobe.reading.statistics import NO_RATIO, ratio, student


def test_student_is_scipys():
    for freedom in range(1, 60):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.01)
    assert np.isnan(student(0))


def test_the_same_seeds_are_compared_in_pairs():
    one, other = {0: 40.0, 1: 44.0, 2: 45.0}, {2: 12.0, 1: 11.0, 0: 10.0}
    found = ratio(one, other)
    logs = np.log([40 / 10, 44 / 11, 45 / 12])
    interval = stats.ttest_rel(np.log([40, 44, 45]), np.log([10, 11, 12])).confidence_interval(0.95)
    assert found.value == pytest.approx(np.exp(logs.mean()), rel=1e-12)
    assert found.stderr == pytest.approx(found.value * stats.sem(logs), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(np.exp(interval), rel=1e-4)
    assert found.paired and found.freedom == 2 and found.resolved


def test_other_seeds_add_their_scatter():
    one, other = {0: 40.0, 1: 44.0, 2: 45.0}, {0: 10.0, 1: 12.0}
    found = ratio(one, other)
    error = np.hypot(stats.sem(np.log([40, 44, 45])), stats.sem(np.log([10, 12])))
    assert found.value == pytest.approx((40 * 44 * 45) ** (1 / 3) / 120**0.5, rel=1e-12)
    assert found.stderr == pytest.approx(found.value * error, rel=1e-9)
    assert not found.paired and found.freedom == 1
    assert found.high == pytest.approx(found.value * np.exp(stats.t.ppf(0.975, 1) * error), rel=1e-4)


def test_one_seed_has_no_error_and_claims_nothing():
    found = ratio({0: 50.0}, {0: 10.0})
    assert found.value == pytest.approx(5.0) and np.isnan([found.stderr, found.low, found.high]).all()
    assert not found.resolved
    assert not ratio({0: 50.0}, {0: 10.0, 1: 11.0}).resolved
    assert ratio({}, {0: 10.0}) is NO_RATIO and not NO_RATIO.resolved


def test_equal_counts_are_as_uncertain_as_counting_in_whole_steps():
    same = dict.fromkeys(range(3), 20.0)
    found = ratio(same, dict.fromkeys(range(3), 10.0), rounding=0.03, other_rounding=0.04)
    assert found.stderr == pytest.approx(2.0 * 0.05 / np.sqrt(3))
    assert ratio({0: 20.0, 1: 30.0}, {0: 10.0, 1: 10.0}, rounding=0.001).stderr == pytest.approx(
        ratio({0: 20.0, 1: 30.0}, {0: 10.0, 1: 10.0}).stderr
    )


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_holds_the_truth_at_least_as_often_as_it_says(paired):
    rng = np.random.default_rng(5)
    trials, held = 3000, 0
    for _ in range(trials):
        shared = 0.3 * rng.standard_normal(3)
        one = np.exp(np.log(50) + shared + 0.05 * rng.standard_normal(3))
        other = np.exp(np.log(10) + (shared if paired else 0) + 0.05 * rng.standard_normal(3))
        seeds = range(3) if paired else range(5, 8)
        found = ratio(dict(enumerate(one)), dict(zip(seeds, other, strict=True)))
        assert found.paired == paired
        held += found.low <= 5 <= found.high
    spread = np.sqrt(0.95 * 0.05 / trials)
    assert held / trials > 0.95 - 4 * spread
    # Pairs are exact; apart, the fewer degrees of freedom are taken, which is on the safe side.
    assert not paired or held / trials < 0.95 + 4 * spread
