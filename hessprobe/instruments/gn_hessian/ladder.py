"""What a step's model leaves out, from the `gn_hessian` table: which of two approximations costs how much along real steps.

Along alpha d, with L the loss, m the prox-linear model mean loss(z + alpha J d) and q_G Gauss-Newton's quadratic:
L - q_G = (m - q_G) + (L - m). The first is what the loss's higher orders add, the second what linearising the network
leaves out (Abreu et al. 2025 test the first alone).
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.norms import errors_to_claim, measured

BEYOND, LINEARISATION = ERRORS = ("beyond_second_order", "linearisation")


def ladder(table: xr.Dataset) -> xr.Dataset:
    """Returns the models' changes and the two errors over training, no rows where the table holds none.

    `change` (step, ladder_direction, model, alpha); `beyond_second_order` and `linearisation` (step, ladder_direction,
    alpha) with `..._stderr` over sequences; `share`, the linearisation's of |m - q_G| + |L - m|, with `share_stderr`, a
    bound whatever the correlation of the two; `dominant`, the name of the larger, "" where their errors leave it open;
    `cancel`, whether they are of opposite signs beyond their errors.
    """
    rows = measured(table, "change", *ERRORS, *(f"{name}_stderr" for name in ERRORS))
    dims = ("step", "ladder_direction", "alpha")
    beyond, linear = (abs(rows[name].transpose(*dims)) for name in ERRORS)
    errors = [rows[f"{name}_stderr"].transpose(*dims) for name in ERRORS]
    both = (beyond + linear).where(beyond + linear > 0)
    share_stderr = (beyond * errors[1] + linear * errors[0]) / both**2
    needed = xr.DataArray([errors_to_claim(count - 1) for count in _sequences(table, rows)], dims="step")
    # One set of sequences gives both errors, so they may be correlated: added, not their squares.
    open_ = ~(abs(linear - beyond) > needed * (errors[0] + errors[1]))
    larger = np.where(linear > beyond, LINEARISATION, BEYOND).astype(object)
    certain = (beyond > needed * errors[0]) & (linear > needed * errors[1])
    return rows.assign(
        share=linear / both,
        share_stderr=share_stderr,
        dominant=(dims, np.where(open_.transpose(*dims), "", larger)),
        cancel=certain & (rows[BEYOND] * rows[LINEARISATION] < 0),
    )


def full_length(rows: xr.Dataset) -> float:
    """Returns the step length nearest the direction's own, alpha = 1."""
    alphas = rows["alpha"].values.astype(float)
    return float(alphas[np.abs(np.log(alphas)).argmin()])


def _sequences(table: xr.Dataset, rows: xr.Dataset) -> list[int]:
    """Returns how many sequences each row's errors rest on; many where the table does not say."""
    if "sequences" not in table:
        return [10**6] * rows.sizes["step"]
    counts = table["sequences"].sel(step=rows["step"]).values.astype(float)
    return [int(count) if np.isfinite(count) else 1 for count in counts]
