"""The spectra of G, H and R from the `gn_hessian` table: extreme eigenvalues, densities, and how much lies below zero.

A Lanczos run from a random start leaves nodes and weights that stand for the start's spectral measure (stochastic Lanczos
quadrature: Ubaru, Chen, Saad 2017). Blurred by a Gaussian they are a density; summed below zero, the negative part.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON, measured

# Of the largest node: what lies within it of zero is round-off of float32 products.
ROUND_OFF = 1e-6
# The blur is this share of the mean distance of a run's nodes: they run together, and no detail is made up.
BLUR = 1 / 3
POINTS_A_WIDTH, WIDTHS_BEYOND = 4, 6


def extremes(table: xr.Dataset) -> xr.Dataset:
    """Returns `lambda_max` and `lambda_min` over training (step, matrix), with `..._residual`.

    An eigenvalue lies within the residual of each: certain, not statistical. The true extremes lie no further in.
    """
    return measured(table, "lambda_max", "lambda_max_residual", "lambda_min", "lambda_min_residual")


def negative_curvature(table: xr.Dataset) -> xr.Dataset:
    """Returns how much of each spectrum lies below zero (step, matrix), means over probes with standard errors.

    `share`, `share_stderr`: the negative eigenvalues' share of sum |lambda|, by jackknife over probes (NaN for one).
    `mass`, `mass_stderr`: the share of eigenvalues below zero. Where most eigenvalues crowd at zero, a node there stands
    for both signs, and quadrature is sure only of `mass_low` to `mass_high` (Chebyshev, Markov, Stieltjes).
    """
    rows = measured(table, "ritz_value", "ritz_weight")
    # (step, matrix, probe, ritz), ascending; a node beyond the Krylov space has no weight.
    dims = ("step", "matrix", "probe", "ritz")
    if rows.sizes["step"] == 0:
        return xr.Dataset(coords={"step": rows["step"]})
    node, weight = (rows[name].transpose(*dims).values for name in ("ritz_value", "ritz_weight"))
    live = np.isfinite(node) & np.isfinite(weight)
    node, weight = np.where(live, node, 0.0), np.where(live, weight, 0.0)
    below = node < -_round_off(rows, node)[:, None, None, None]
    probed = np.asarray(live.any(-1))
    size = np.abs(node) * weight
    share, share_stderr = _jackknife((size * below).sum(-1), size.sum(-1), probed)
    parts = [(weight * below).sum(-1), *_mass_bounds(weight, below, live)]
    count = probed.sum(-1)
    mass, low, high = (
        np.where(count > 0, (part * probed).sum(-1) / np.maximum(count, 1), np.nan) for part in parts
    )
    spread = (((parts[0] - mass[..., None]) ** 2) * probed).sum(-1)
    stderr = np.sqrt(spread / np.where(count > 1, count * (count - 1), np.nan))
    columns = {"share": share, "share_stderr": share_stderr, "mass": mass, "mass_stderr": stderr}
    columns |= {"mass_low": low, "mass_high": high}
    return xr.Dataset(
        {name: (("step", "matrix"), column) for name, column in columns.items()},
        coords={"step": rows["step"], "matrix": rows["matrix"]},
    )


def smoothed_density(row: xr.Dataset, block: str | None = None) -> xr.Dataset | None:
    """Returns the densities of G, H and R at one row (matrix, eigenvalue), each of which integrates to 1.

    `density` is the mean over probes, `low` and `high` the least and most of them; attribute `width`, the blur's standard
    deviation. None where the row holds no nodes.

    Args:
        row: of the table, one step.
        block: one of its density blocks; default the whole matrices.
    """
    prefix = "" if block is None else "block_"
    names = f"{prefix}ritz_value", f"{prefix}ritz_weight"
    if any(name not in row for name in names):
        return None
    found = row[list(names)] if block is None else row[list(names)].sel(density_block=block)
    node, weight = (found[name].transpose("matrix", "probe", "ritz").values for name in names)
    live = np.isfinite(node) & np.isfinite(weight)
    if not live.any():
        return None
    ends = np.array([node[live].min(), node[live].max()])
    # Matrices without any curvature still have a density: a bell about zero.
    span = float(np.ptp(ends)) or float(np.abs(ends).max()) or 1.0
    width = BLUR * span / live.sum(-1).max()
    reach = WIDTHS_BEYOND * width
    count = int(np.ceil(POINTS_A_WIDTH * (np.ptp(ends) + 2 * reach) / width))
    at = np.linspace(ends[0] - reach, ends[1] + reach, count)
    bells = np.exp(-0.5 * ((np.where(live, node, 0.0)[..., None] - at) / width) ** 2)
    density = (np.where(live, weight, 0.0)[..., None] * bells).sum(-2) / (width * np.sqrt(2 * np.pi))
    found_by = xr.DataArray(density, dims=("matrix", "probe", "eigenvalue")).where(
        xr.DataArray(np.asarray(live.any(-1)), dims=("matrix", "probe"))
    )
    return xr.Dataset(
        {"density": found_by.mean("probe"), "low": found_by.min("probe"), "high": found_by.max("probe")},
        coords={"matrix": found["matrix"].values, "eigenvalue": at},
        attrs={"width": width},
    )


def _round_off(rows: xr.Dataset, node: np.ndarray) -> np.ndarray:
    """Returns how far below zero (step,) a node may lie by round-off: G, which has no negative eigenvalue, shows it."""
    of_g = node[:, rows["matrix"].values.tolist().index(GAUSS_NEWTON)]
    return np.maximum(ROUND_OFF * np.abs(node).max((1, 2, 3)), -of_g.min((1, 2)))


def _mass_bounds(weight: np.ndarray, below: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns bounds (..., probe) of each start's measure below zero: without the last node there, with the next one."""
    held = np.cumsum(weight, -1)
    count = below.sum(-1)

    def upto(nodes: np.ndarray) -> np.ndarray:
        last = np.clip(nodes, 0, live.sum(-1)) - 1
        return np.where(last < 0, 0.0, np.take_along_axis(held, np.maximum(last, 0)[..., None], -1)[..., 0])

    return upto(count - 1), upto(count + 1)


def _jackknife(part: np.ndarray, whole: np.ndarray, probed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns sum(part) / sum(whole) over the last axis, and its standard error from leaving each out."""
    part, whole = part * probed, whole * probed
    sums = part.sum(-1, keepdims=True), whole.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (sums[0] / sums[1])[..., 0]
        left_out = np.where(probed, (sums[0] - part) / (sums[1] - whole), 0.0)
    count = probed.sum(-1)
    centred = np.where(probed, left_out - (left_out.sum(-1) / np.maximum(count, 1))[..., None], 0.0)
    stderr = np.sqrt((centred**2).sum(-1) * (count - 1) / np.maximum(count, 1))
    return value, np.where(count > 1, stderr, np.nan)
