"""Does a quantity rise or fall over training? A straight line through the measured rows, and its error.

The slope's standard error is the larger of two: what the rows' scatter about the line implies (ordinary least
squares) and what their own measuring errors imply. Four rows and two standard errors make a trend.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

MINIMUM_ROWS = 4
STANDARD_ERRORS = 2.0


def standard_errors_of_largest(count: int) -> float:
    """Returns how many standard errors the largest of `count` numbers must lie beyond to be claimed.

    As rarely exceeded by pure noise as two are by a single number (Bonferroni).
    """
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-STANDARD_ERRORS) / max(count, 1))


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A line's change over the measured range (slope times range), with its standard error."""

    change: float
    stderr: float
    rows: int
    first_step: int
    last_step: int

    @property
    def resolved(self) -> bool:
        """Whether the change lies beyond two of its standard errors."""
        return abs(self.change) > STANDARD_ERRORS * self.stderr


def trend(steps: np.ndarray, values: np.ndarray, stderr: np.ndarray | None = None) -> Trend | None:
    """Returns the trend of `values` (n,) over `steps` (n,), or None with fewer than four finite rows.

    Args:
        steps: training steps.
        values: one number a row; rows that are not finite are left out.
        stderr: the rows' own standard errors; None where values are exact on their batch.
    """
    errors = np.zeros_like(values) if stderr is None else stderr
    keep = np.isfinite(values) & np.isfinite(errors)
    x, y, errors = steps[keep].astype(float), values[keep], errors[keep]
    if x.size < MINIMUM_ROWS or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread
    residual = y - y.mean() - slope * centred
    from_scatter = np.sqrt(residual @ residual / (x.size - 2) / spread)
    from_errors = np.sqrt((centred**2) @ errors**2) / spread
    length = float(np.ptp(x))
    return Trend(
        change=slope * length,
        stderr=float(max(from_scatter, from_errors)) * length,
        rows=int(x.size),
        first_step=int(x[0]),
        last_step=int(x[-1]),
    )
