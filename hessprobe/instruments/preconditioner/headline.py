"""What a run says of a measured row while it trains: how well the best candidate does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def headline(row: Mapping[str, Any]) -> str:
    """Returns the best efficiency on held-out sequences, at the largest curvature batch and the first damping."""
    best, stderr = (
        _mean_of_known(np.asarray(row[name])[..., -1, 0])
        for name in ("efficiency_held_out", "efficiency_held_out_stderr")
    )
    failed = sum(bool(reason) for reason in row["candidate_failure"])
    text = f"{best.size - failed} candidates"
    if np.isfinite(best).any():
        at = int(np.where(np.isnan(best), -np.inf, best).argmax())
        text += f", the best held-out efficiency {best[at]:.3f} ± {stderr[at]:.3f}"
    return text + (f", {failed} failed" if failed else "")


def _mean_of_known(draws: np.ndarray) -> np.ndarray:
    """Returns means over the first axis that leave NaN out, NaN where there is nothing else."""
    known = ~np.isnan(draws)
    with np.errstate(invalid="ignore"):
        return np.where(known, draws, 0).sum(0) / known.sum(0)
