"""How good each candidate preconditioner is, from the `preconditioner` table: efficiency, and decreases to compare by.

Along its best multiple a direction d lowers the damped quadratic model by (g.d)^2 / (2 (d.Gd + mu |d|^2)); efficiency is
that over the model's own optimum, g.G_mu^-1 g / 2. Held-out figures are judged on sequences that no candidate has seen,
with errors from the jackknife over their folds.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.preconditioner.recipe import GROUPED
from hessprobe.instruments.preconditioner.table import EVERY, FULL, LAYERWISE, dims_of_variables
from hessprobe.reading.rows import sound_rows

# What this file and its neighbours read; of the rest, older and newer tables may hold more or less.
READ = (
    "efficiency", "efficiency_held_out", "best_alpha", "cosine", "slope", "curvature", "norm2", "solver_residual",
    "slope_held_out", "curvature_held_out", "fold_tokens", "optimal_decrease_held_out", "optimal_residual",
    "optimal_residual_held_out", "condition", "block_efficiency", "block_slope", "block_norm2", "block_curvature",
    "block_slope_held_out", "block_curvature_held_out",
)  # fmt: skip
# All that decreases need.
JUDGED = ["slope", "curvature", "norm2", "slope_held_out", "curvature_held_out", "fold_tokens"]
ROUNDING = 1e-6


def preconditioner_rows(table: xr.Dataset) -> xr.Dataset | None:
    """Returns the rows with held-out figures, NaN for variables the table does not hold; None where no row is left.

    Pairs of blocks of a log that is read lazily stay so: they can be larger than memory.
    """
    if "slope_held_out" not in table:
        return None
    asked = [name for name in ("slope_held_out", "failure", "recorded") if name in table]
    steps = sound_rows(table[asked], "slope_held_out")["step"].values
    # Rows that are all sound stay where they are: a copy of a long log would be taken at every question.
    whole = steps.size == table.sizes["step"]
    rows = table if whole else table.isel(step=np.flatnonzero(np.isin(table["step"].values, steps)))
    declared = dims_of_variables()
    labelled = {dim for name in READ for dim in declared[name]} - {"step"}
    if rows.sizes["step"] == 0 or any(dim not in rows.sizes or dim not in rows.coords for dim in labelled):
        return None
    for name in set(READ) - set(map(str, rows.data_vars)):
        shape = [rows.sizes[dim] for dim in declared[name]]
        rows = rows.assign({name: (declared[name], np.full(shape, np.nan))})
    small = [name for name, values in rows.data_vars.items() if "other_block" not in values.dims]
    return _as_read(rows.assign(rows[small].compute().data_vars))


def _as_read(rows: xr.Dataset) -> xr.Dataset:
    """Returns rows without the draws, sizes and folds that no row had sequences for, a smaller size under its own number."""
    if "curvature_sequences_read" not in rows:
        return rows
    reached = {
        "curvature_sequences": rows["curvature_sequences_read"].notnull().any("step").values,
        "draw": rows["optimal_residual"].notnull().any(["step", "curvature_sequences", "damping"]).values,
        "fold": (rows["fold_tokens"] > 0).any("step").values,
    }
    kept = {dim: np.flatnonzero(there) for dim, there in reached.items() if there.any() and not there.all()}
    rows = rows.isel(kept) if kept else rows
    read = rows["curvature_sequences_read"].max("step").values
    labels = rows["curvature_sequences"].values
    if np.isfinite(read).all() and (read < labels).any():
        rows = rows.assign_coords(curvature_sequences=read.astype(labels.dtype))
    return rows


def decreases(rows: xr.Dataset) -> xr.Dataset:
    """Returns each candidate's decrease along its best step, in nats per token, NaN where it points uphill.

    Variables `own` and `held_out` (step, draw, candidate, curvature_sequences, damping), and `left_out` (..., fold), the
    held-out decrease with each fold left out, for jackknife errors.

    Args:
        rows: of `preconditioner_rows`; only candidates that are wanted, where folds are many.
    """
    slope, bend, norm2 = (rows[name].transpose(*EVERY).values for name in ("slope", "curvature", "norm2"))
    parts = [rows[name].transpose(*EVERY, "fold").values for name in ("slope_held_out", "curvature_held_out")]
    tokens = rows["fold_tokens"].transpose("step", "fold").values
    damped = rows["damping"].values.astype(float) * norm2
    whole = [part.sum(-1) for part in parts]
    # Folds are parts of a mean over tokens: what is left without one is weighted up again.
    total = tokens.sum(-1, keepdims=True)
    others = np.where(total > tokens, total - tokens, np.nan)
    again = (total / others)[:, None, None, None, None]
    with np.errstate(invalid="ignore"):
        left_out = [(sums[..., None] - part) * again for sums, part in zip(whole, parts, strict=True)]
    return xr.Dataset(
        {
            "own": (EVERY, best_decrease(slope, bend + damped)),
            "held_out": (EVERY, best_decrease(whole[0], whole[1] + damped)),
            "left_out": ((*EVERY, "fold"), best_decrease(left_out[0], left_out[1] + damped[..., None])),
        },
        coords={name: rows[name] for name in EVERY},
    )


def best_decrease(slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Returns slope^2 / (2 curvature), the decrease along the best step; NaN where there is none above zero."""
    with np.errstate(all="ignore"):  # overflow and infinities give no decrease either
        decrease = slope**2 / (2 * curvature)
        return np.where((slope < 0) & (decrease > 0) & np.isfinite(decrease), decrease, np.nan)


def jackknife_error(left_out: xr.DataArray) -> xr.DataArray:
    """Returns the standard error (...) of a value from those with each fold left out (..., fold)."""
    folds = left_out.sizes["fold"]
    centred = left_out - left_out.mean("fold", skipna=False)
    variance = (centred**2).sum("fold", skipna=False) * (folds - 1) / folds
    return variance.where(folds > 1) ** 0.5


def efficiency(
    rows: xr.Dataset, damping: float | None = None, curvature_sequences: int | None = None
) -> xr.Dataset:
    """Returns `own` and `held_out` efficiency over training (step, candidate), means over draws, with errors.

    `own_stderr` is the spread over draws alone (NaN for one draw: exact on its batch); `held_out_stderr` has the folds'
    and, of several draws, theirs too. The optimum that both are shares of is taken as exact.

    Args:
        rows: of `preconditioner_rows`.
        damping, curvature_sequences: default the table's first damping and its largest curvature batch.
    """
    at = rows.sel(place(rows, damping, curvature_sequences))
    own, held_out = at["efficiency"], at["efficiency_held_out"]
    left_out = decreases(rows.sel({name: [float(at[name])] for name in ("damping", "curvature_sequences")}))[
        "left_out"
    ].isel(damping=0, curvature_sequences=0)
    folds = jackknife_error((left_out / at["optimal_decrease_held_out"]).mean("draw"))
    spread = {name: _spread(value) for name, value in (("own", own), ("held_out", held_out))}
    return xr.Dataset(
        {
            "own": own.mean("draw"),
            # Full Gauss-Newton reaches 1 on its own batch by definition: what rounding scatters is no spread.
            "own_stderr": spread["own"].where(spread["own"] > ROUNDING),
            "held_out": held_out.mean("draw"),
            "held_out_stderr": np.hypot(folds, spread["held_out"].fillna(0)),
        }
    ).compute()


def place(
    rows: xr.Dataset, damping: float | None = None, curvature_sequences: int | None = None
) -> dict[str, float]:
    """Returns the labels of one damping and one curvature batch; default the first and the largest."""
    size = rows["curvature_sequences"].values[-1] if curvature_sequences is None else curvature_sequences
    return {
        "damping": float(rows["damping"].values[0]) if damping is None else damping,
        "curvature_sequences": size,
    }


def scoreboard(
    rows: xr.Dataset,
    step: int | None = None,
    damping: float | None = None,
    curvature_sequences: int | None = None,
) -> xr.Dataset:
    """Returns every candidate (candidate,) at one row: efficiencies with errors, best step, cosine, condition, residual.

    Variables `own`, `own_stderr`, `held_out`, `held_out_stderr`, `best_alpha`, `cosine`, `condition`, `residual` (the
    largest of its solves), `uphill` (on the held-out sequences, in any draw), `failure`.

    Args:
        rows: of `preconditioner_rows`.
        step: a measured step; default the last.
        damping, curvature_sequences: as in `efficiency`.
    """
    row = rows.isel(step=[-1]) if step is None else rows.sel(step=[step])
    result = efficiency(row, damping, curvature_sequences).isel(step=0)
    row = row.isel(step=0)
    at = row.sel(place(rows, damping, curvature_sequences))
    slope = at["slope_held_out"].sum("fold", skipna=False)
    failure = candidate_failures(row)
    return result.assign(
        best_alpha=at["best_alpha"].mean("draw"),
        cosine=at["cosine"].mean("draw"),
        condition=at["condition"],
        residual=at["solver_residual"].max("draw"),
        uphill=(slope >= 0).any("draw"),
        failure=("candidate", [failure.get(str(name), "") for name in row["candidate"].values]),
    ).compute()


def candidate_failures(row: xr.Dataset) -> dict[str, str]:
    """Returns {candidate: reason} of those that could not be judged at one row."""
    if "candidate_failure" not in row:
        return {}
    reasons = zip(row["candidate"].values, row["candidate_failure"].values, strict=True)
    return {str(name): str(reason) for name, reason in reasons if reason}


def practical(names: np.ndarray) -> list[str]:
    """Returns the candidates that are no exact Gauss-Newton solve, layerwise, full or in groups."""
    oracles = (LAYERWISE, FULL)
    return [str(name) for name in names if name not in oracles and not str(name).startswith(GROUPED)]


def _spread(values: xr.DataArray) -> xr.DataArray:
    """Returns the standard error of a mean over draws; NaN where there are fewer than two."""
    count = values.notnull().sum("draw")
    centred = values - values.mean("draw")
    return ((centred**2).sum("draw") / (count * (count - 1)).where(count > 1)) ** 0.5
