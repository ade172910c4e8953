"""What a picture has room for: which points of a long series, which ticks, how many letters of a name."""

from __future__ import annotations

import numpy as np

# An SVG path of 4,000 points draws at once; more would only overdraw the same pixels.
POINTS_DRAWN = 4000
# Up to here each point has its marker and its error bar; beyond, errors are a band.
SINGLE_POINTS = 60
COLUMNS_DRAWN = 60
NAMES_SHOWN = 40
LETTERS = 18


def drawn_points(values: np.ndarray, limit: int = POINTS_DRAWN) -> np.ndarray:
    """Returns the indices to draw of a long series: each bucket's lowest and highest, so no spike is lost."""
    if values.size <= limit:
        return np.arange(values.size)
    buckets = np.array_split(np.arange(values.size), limit // 2)
    with_gaps = np.where(np.isfinite(values), values, 0.0)
    ends = [(b[with_gaps[b].argmin()], b[with_gaps[b].argmax()]) for b in buckets]
    return np.unique([0, *np.ravel(ends), values.size - 1])


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Returns at most `limit` indices out of `count`, evenly spaced, the last always among them."""
    if limit < 2:
        return np.array([count - 1])
    return np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))


def short(name: str) -> str:
    """Returns a name as a tick can show it; of a pair `a × b`, each half so."""
    halves = str(name).split(" × ")
    return " × ".join(half if len(half) <= LETTERS else f"{half[:8]}…{half[-9:]}" for half in halves)


def ratio_ticks(values: np.ndarray) -> list[float]:
    """Returns plain numbers as ticks of a logarithmic axis about 1, as fine as the range of the values asks for."""
    values = values[np.isfinite(values) & (values > 0)]
    decades = float(np.log10(values.max() / values.min())) if values.size else 0.0
    digits: tuple[float, ...] = (1,)
    if decades < 0.35:
        digits = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    elif decades < 0.9:
        digits = (1, 1.5, 2, 3, 4, 5, 7)
    elif decades < 2.5:
        digits = (1, 2, 5)
    return [digit * 10.0**power for power in range(-6, 7) for digit in digits]


def fraction(power: int) -> str:
    """Returns a power of two as a tick of ratios: 4, 1, 1/4."""
    return f"{2**power:g}" if power >= 0 else f"1/{2**-power}"
