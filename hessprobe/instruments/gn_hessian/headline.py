"""What a run says of a measured row while it trains: how far the Hessian is from Gauss-Newton's matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hessprobe.instruments.gn_hessian.table import MATRICES


def headline(row: Mapping[str, Any]) -> str:
    """Returns a row's most telling numbers in a few words."""
    text = f"|H - G| / |G| {float(row['gn_gap']):.3f} ± {float(row['gn_gap_stderr']):.3f}"
    smallest = float(row["lambda_min"][MATRICES.index("hessian")])
    return text + (f", least eigenvalue of H {smallest:+.3g}" if math.isfinite(smallest) else "")
