"""A trend is claimed when it is there, and, over many runs of pure noise, as rarely as two errors allow."""

from __future__ import annotations

import numpy as np
import pytest

from hessprobe.reading.trend import standard_errors_of_largest, trend


def test_the_slope_is_the_least_squares_one():
    rng = np.random.default_rng(1)
    steps, values = np.array([0, 10, 20, 50, 70]), rng.random(5)
    line = trend(steps, values)
    slope = np.polyfit(steps, values, 1)[0]
    assert line is not None
    assert line.change == pytest.approx(70 * slope, rel=1e-12)
    residual = values - np.polyval(np.polyfit(steps, values, 1), steps)
    stderr = np.sqrt(residual @ residual / 3 / ((steps - steps.mean()) ** 2).sum())
    assert line.stderr == pytest.approx(70 * stderr, rel=1e-10)


def test_fewer_than_four_measured_steps_make_no_trend():
    steps, values = np.arange(5), np.array([0.0, 1.0, np.nan, 2.0, np.inf])
    assert trend(steps, values) is None
    assert trend(np.zeros(5), np.arange(5.0)) is None


def test_points_on_a_line_within_their_own_errors_are_no_trend():
    steps, values = np.arange(4.0), np.array([0.0, 0.1, 0.2, 0.3])
    exact, noisy = trend(steps, values), trend(steps, values, np.full(4, 0.2))
    assert exact is not None and exact.resolved
    assert noisy is not None and not noisy.resolved
    # The measuring errors alone: sd(slope) = 0.2 / sqrt(sum of squares of centred steps) = 0.2 / sqrt(5).
    assert noisy.stderr == pytest.approx(3 * 0.2 / np.sqrt(5), rel=1e-12)


def test_the_largest_of_many_numbers_of_noise_is_claimed_as_rarely_as_one_beyond_two_errors():
    assert standard_errors_of_largest(1) == pytest.approx(2) and standard_errors_of_largest(
        0
    ) == pytest.approx(2)
    largest = np.random.default_rng(0).standard_normal((20_000, 91)).max(axis=1)
    claimed = (largest > standard_errors_of_largest(91)).mean()
    # 2.3 % for one number on one side; 20,000 draws know it to 0.1 %.
    assert claimed == pytest.approx(0.0225, abs=0.004)


def test_noise_is_rarely_called_a_trend_and_a_real_one_is_found():
    rng = np.random.default_rng(2)
    steps = np.arange(20.0)
    claimed = [trend(steps, rng.standard_normal(20), np.ones(20)) for _ in range(400)]
    # Two standard errors of a known normal: 4.6 % at most (the larger of two errors only makes it rarer).
    assert sum(line is not None and line.resolved for line in claimed) <= 0.08 * 400
    found = trend(steps, 0.5 * steps + rng.standard_normal(20), np.ones(20))
    assert found is not None and found.resolved and abs(found.change - 9.5) < 3 * found.stderr
