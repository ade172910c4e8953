"""How many times as much does one method take as another, and how sure is that? From one number a seed.

The ratio is that of geometric means, exp(mean log a - mean log b); its error comes from the seeds' scatter of
the logarithms (delta method: stderr = ratio x stderr of the log-ratio), its interval from Student's t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

# 97.5 % quantiles of Student's t for 1, 2 ... 10 degrees of freedom: with three seeds two standard errors would
# cover 82 %, not 95.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio with its standard error and 95 % interval; NaN where one seed alone gives no error.

    `paired`: seeds were shared, so that what a seed does to both cancels. `freedom`: degrees of freedom.
    """

    value: float
    stderr: float
    low: float
    high: float
    paired: bool
    freedom: int

    @property
    def resolved(self) -> bool:
        """Whether the 95 % interval leaves out 1."""
        return bool(self.low > 1 or self.high < 1)


NO_RATIO = Ratio(value=np.nan, stderr=np.nan, low=np.nan, high=np.nan, paired=False, freedom=0)


def ratio(
    values: Mapping[int, float],
    others: Mapping[int, float],
    rounding: float = 0.0,
    other_rounding: float = 0.0,
) -> Ratio:
    """Returns how many times `others` the `values` are.

    Args:
        values, others: {seed: positive number}. The same seeds in both are taken as pairs.
        rounding, other_rounding: relative standard deviation of one value from counting in whole steps; the error
            is never below what it implies, so that equal counts do not pass for exact ones.
    """
    if not values or not others:
        return NO_RATIO
    paired = len(values) > 1 and set(values) == set(others)
    one = np.log([values[seed] for seed in sorted(values)])
    other = np.log([others[seed] for seed in sorted(others)])
    difference = float(one.mean() - other.mean())
    freedom = min(one.size, other.size) - 1
    error = np.nan
    if freedom > 0:
        scatter = _variance(one - other) if paired else _variance(one) + _variance(other)
        error = np.sqrt(max(scatter, rounding**2 / one.size + other_rounding**2 / other.size))
    reach = student(freedom) * error
    return Ratio(
        value=float(np.exp(difference)),
        stderr=float(np.exp(difference) * error),
        low=float(np.exp(difference - reach)),
        high=float(np.exp(difference + reach)),
        paired=paired,
        freedom=freedom,
    )


def student(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t; NaN without a degree of freedom."""
    if freedom < 1:
        return np.nan
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    # The expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), within 0.01 from here on.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _variance(logs: np.ndarray) -> float:
    """Returns the variance of the mean."""
    return float(logs.var(ddof=1)) / logs.size


def error_of(stderr: xr.DataArray) -> float | None:
    """Returns a standard error, or None where there is none to state."""
    value = float(stderr)
    return value if np.isfinite(value) else None
