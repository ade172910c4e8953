"""What a run says of a measured row while it trains: how much lies between layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def headline(row: Mapping[str, Any]) -> str:
    """Returns a row's most telling numbers in a few words."""
    along = np.asarray(row["step_curvature"])[0]
    energy, stderr = (float(row[f"off_block_energy{tail}"]) for tail in ("", "_stderr"))
    text = f"off-block energy {energy:.3f} ± {stderr:.3f}"
    with np.errstate(divide="ignore", invalid="ignore"):
        share = float(1 - np.trace(along) / along.sum())
    if math.isfinite(share):  # no update, no share
        text += f", cross share of the update's curvature {share:+.2f}"
    return text
