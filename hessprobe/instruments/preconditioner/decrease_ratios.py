"""How many times another's held-out decrease does a candidate reach, and from which curvature batch do layers' pairs pay?

Logarithms of ratios are averaged over draws and measured steps. Their errors: of the held-out sequences, the jackknife
over folds, both candidates with the same fold left out (paired); of the curvature batches, the spread over draws where
there are two or more. Measured steps read sequences of their own. Where steps scatter more than that, their scatter counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.preconditioner.efficiency import JUDGED, decreases, preconditioner_rows
from hessprobe.instruments.preconditioner.table import FULL, LAYERWISE
from hessprobe.reading.trend import STANDARD_ERRORS


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Means of n logarithms over draws and steps, and their covariance (n, n); NaN where nothing was measured.

    `per_step` (t, n) and `per_step_stderr` are the steps' own, `used` (t,) those in the means.
    """

    mean: np.ndarray
    covariance: np.ndarray
    per_step: np.ndarray
    per_step_stderr: np.ndarray
    used: np.ndarray

    @property
    def stderr(self) -> np.ndarray:
        """Standard errors of the means (n,)."""
        return np.sqrt(np.diagonal(self.covariance))


def combine(values: np.ndarray, left_out: np.ndarray | None = None) -> Combined:
    """Returns means over draws and steps of numbers that share their held-out sequences.

    A step counts where all of the n numbers that were ever measured are there.

    Args:
        values: (t, d, n) by step and draw.
        left_out: (t, d, n, f) with each fold left out; None for numbers that are exact but for what was drawn.
    """
    steps, _, count = values.shape
    per_step = _mean(values, 1)
    kept = np.asarray(np.isfinite(per_step).any(0))
    used = np.asarray(np.isfinite(per_step[:, kept]).all(1) & kept.any())
    folds = np.zeros((steps, count, count))
    if left_out is not None:
        folds = _covariances_of_folds(_mean(left_out, 1))
    among_draws = _covariance_among_draws(values[used], kept)
    drawn = among_draws is not None
    among_draws = np.zeros((count, count)) if among_draws is None else among_draws
    taken = int(used.sum())
    mean, covariance = np.full(count, np.nan), np.full((count, count), np.nan)
    if taken:
        mean = np.where(kept, per_step[used].sum(0) / taken, np.nan)
        covariance = (folds[used].sum(0) / taken + among_draws) / taken
        scatter = _covariance_of_mean(per_step[used])
        if scatter is not None:
            covariance = _at_least(covariance, np.diagonal(scatter))
        if left_out is None and scatter is None and not drawn:
            covariance = np.full_like(covariance, np.nan)  # one number: no telling how far others would lie
    errors = np.sqrt(np.diagonal(folds + among_draws, axis1=1, axis2=2))
    if left_out is None and not drawn:
        errors = np.full_like(errors, np.nan)
    return Combined(mean=mean, covariance=covariance, per_step=per_step, per_step_stderr=errors, used=used)


def decrease_ratios(rows: xr.Dataset, other: str = LAYERWISE) -> xr.Dataset:
    """Returns how many times `other`'s decrease each candidate's is (candidate, curvature_sequences, damping).

    Variables `ratio`, `stderr` (held out), `own_ratio`, `own_stderr` (on the curvature batches), `steps` used; and over
    training `per_step`, `per_step_stderr` (step, ...), `own_per_step`. All NaN where there is no `other`.

    Args:
        rows: of `preconditioner_rows`.
        other: the candidate compared with.
    """
    dims = ("candidate", "curvature_sequences", "damping")
    labels = {dim: rows[dim].values for dim in ("step", *dims)}
    shape = tuple(rows.sizes[dim] for dim in dims)
    arrays = {
        name: np.full(shape, np.nan) for name in ("ratio", "stderr", "own_ratio", "own_stderr", "steps")
    }
    over = ("per_step", "per_step_stderr", "own_per_step")
    arrays |= {name: np.full((rows.sizes["step"], *shape), np.nan) for name in over}
    if other in rows["candidate"].values:
        base = _logs(rows, other)
        for i, name in enumerate(map(str, rows["candidate"].values)):
            logs = _logs(rows, name)
            for j in range(shape[-1]):
                held_out, own = _compared(logs, base, j)
                at = (i, slice(None), j)
                arrays["ratio"][at], arrays["stderr"][at] = np.exp(held_out.mean), _scaled(held_out)
                arrays["own_ratio"][at], arrays["own_stderr"][at] = np.exp(own.mean), _scaled(own)
                arrays["steps"][at] = held_out.used.sum()
                each = np.exp(held_out.per_step)
                arrays["per_step"][:, *at], arrays["own_per_step"][:, *at] = each, np.exp(own.per_step)
                arrays["per_step_stderr"][:, *at] = each * held_out.per_step_stderr
    return xr.Dataset(
        {name: (dims if values.ndim == 3 else ("step", *dims), values) for name, values in arrays.items()},
        coords=labels,
    )


def closest(rows: xr.Dataset, names: list[str]) -> tuple[str, int, int] | None:
    """Returns which candidate gets farthest held out, how many more cannot be told from it, and how many were measured.

    At the first damping and the largest curvature batch, by the ratio to the layerwise oracle; None where none was
    measured beside it.
    """
    rows = rows.isel(curvature_sequences=[-1], damping=[0])
    if LAYERWISE not in rows["candidate"].values:
        return None
    base = _logs(rows, LAYERWISE)
    logs = {name: _logs(rows, name) for name in names}
    means = {name: float(_compared(each, base, 0)[0].mean[0]) for name, each in logs.items()}
    measured = [name for name, mean in means.items() if np.isfinite(mean)]
    if not measured:
        return None
    best = max(measured, key=lambda name: means[name])
    apart = [_compared(logs[name], logs[best], 0)[0] for name in measured if name != best]
    # Without an error nothing is told apart.
    rivals = sum(not each.mean[0] < -STANDARD_ERRORS * each.stderr[0] for each in apart)
    return best, rivals, len(measured)


def cross_layer_pays(table: xr.Dataset) -> xr.Dataset:
    """Returns from which curvature batch on full Gauss-Newton gets farther than layerwise, for each damping (damping,).

    Variables over (damping, curvature_sequences): `ratio`, the held-out decrease of layerwise over full, `stderr`,
    `own_ratio`, `own_stderr`, `ahead` (-1 full, 1 layerwise, 0 where two errors do not tell). Over damping: `verdict`
    ("pays": full is ahead wherever the two can be told apart; "does not pay": layerwise is; "pays from a size on"; "pays
    up to a size"; "not resolved"; "not measured"), `crossover`, the sequences at which the ratio crosses 1, by
    interpolation in their logarithm, with `crossover_low` and `crossover_high` one standard error away, `below` and
    `above`, the nearest sizes on either side where the ratio lies beyond two errors from 1, and `steps`, how many were
    used. Over (damping, step, curvature_sequences): `per_step` and `per_step_stderr`, the ratio at each measured step. No
    row measured: length 0.

    Args:
        table: the table `preconditioner`, or rows of it.
    """
    rows = preconditioner_rows(table)
    if rows is None or not {LAYERWISE, FULL} <= set(rows["candidate"].values):
        return xr.Dataset(coords={"damping": [], "curvature_sequences": []})
    sizes, found = rows["curvature_sequences"].values, []
    one, other = _logs(rows, LAYERWISE), _logs(rows, FULL)
    for j in range(rows.sizes["damping"]):
        held_out, own = _compared(one, other, j)
        each = np.exp(held_out.per_step)
        found.append(
            {
                "ratio": np.exp(held_out.mean),
                "stderr": _scaled(held_out),
                "own_ratio": np.exp(own.mean),
                "own_stderr": _scaled(own),
                "per_step": each,
                "per_step_stderr": each * held_out.per_step_stderr,
                **_crossing(sizes, held_out),
            }
        )
    dims = (("damping",), ("damping", "curvature_sequences"), ("damping", "step", "curvature_sequences"))
    return xr.Dataset(
        {name: (dims[np.ndim(value)], [each[name] for each in found]) for name, value in found[0].items()},
        coords={name: rows[name].values for name in dims[2]},
        attrs={"draws": rows.sizes["draw"], "folds": rows.sizes["fold"]},
    )


def _crossing(sizes: np.ndarray, logs: Combined) -> dict[str, Any]:
    """Returns the verdict on one damping and where the ratio crosses 1."""
    nothing = dict.fromkeys(("crossover", "crossover_low", "crossover_high", "below", "above"), np.nan)
    result: dict[str, Any] = {**nothing, "verdict": "not measured", "steps": int(logs.used.sum())}
    beyond = np.abs(logs.mean) > STANDARD_ERRORS * logs.stderr
    result["ahead"] = ahead = np.where(beyond, np.sign(logs.mean), 0.0)
    known = np.flatnonzero(np.isfinite(logs.mean))
    if known.size == 0:
        return result
    sign = ahead[known]
    resolved = np.flatnonzero(sign)
    changes = [(i, j) for i, j in pairwise(resolved) if sign[i] != sign[j]]
    if resolved.size == 0:
        result["verdict"] = "not resolved"
    elif not changes:
        result["verdict"] = "pays" if sign[resolved[0]] < 0 else "does not pay"
    elif len(changes) > 1:
        result["verdict"] = "not resolved"
    else:
        (i, j), names = changes[0], ("pays up to a size", "pays from a size on")
        result["verdict"] = names[int(sign[i] > 0)]
        result["below"], result["above"] = float(sizes[known[i]]), float(sizes[known[j]])
    x, y = np.log(sizes[known].astype(float)), logs.mean[known]
    crossed = np.flatnonzero(np.sign(y[:-1]) != np.sign(y[1:]))
    if len(changes) <= 1 and crossed.size == 1:
        at, high = known[crossed[0]], known[crossed[0] + 1]
        (x0, x1), (y0, y1) = x[crossed[0] :][:2], y[crossed[0] :][:2]
        middle = x0 - y0 * (x1 - x0) / (y1 - y0)
        # d(middle) by d(y0, y1), with what the two share through their sequences.
        slope = (x1 - x0) / (y1 - y0) ** 2 * np.array([-y1, y0])
        variance = slope @ logs.covariance[np.ix_([at, high], [at, high])] @ slope
        reach = np.sqrt(max(variance, 0.0)) if np.isfinite(variance) else np.nan
        result |= {
            "crossover": float(np.exp(middle)),
            "crossover_low": float(np.exp(middle - reach)),
            "crossover_high": float(np.exp(min(middle + reach, 50.0))),
        }
    return result


_Logs = dict[str, np.ndarray]


def _logs(rows: xr.Dataset, candidate: str) -> _Logs:
    """Returns a candidate's log decreases: own and held_out (t, d, n, m), left_out (t, d, n, m, f)."""
    found = decreases(rows[JUDGED].sel(candidate=[candidate]))
    return {str(name): np.log(values.values[:, :, 0]) for name, values in found.items()}


def _compared(one: _Logs, other: _Logs, damping: int) -> tuple[Combined, Combined]:
    """Returns one candidate over another at one damping, held out and on the own batches, by curvature batch."""
    held_out, left_out, own = (
        (one[name] - other[name])[:, :, :, damping] for name in ("held_out", "left_out", "own")
    )
    return combine(held_out, left_out), combine(own)


def _scaled(logs: Combined) -> np.ndarray:
    """Returns standard errors of the ratios themselves."""
    return np.exp(logs.mean) * logs.stderr


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the mean of the finite values along an axis, NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis)
    total = np.where(finite, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _covariances_of_folds(left_out: np.ndarray) -> np.ndarray:
    """Returns the jackknife's covariances (t, n, n) from values (t, n, f); NaN with one fold."""
    steps, count, folds = left_out.shape
    if folds < 2:
        return np.full((steps, count, count), np.nan)
    centred = left_out - left_out.mean(-1, keepdims=True)
    return centred @ centred.transpose(0, 2, 1) * (folds - 1) / folds


def _covariance_among_draws(values: np.ndarray, kept: np.ndarray) -> np.ndarray | None:
    """Returns the covariance (n, n) of a step's mean over its draws, the mean over steps; None for fewer than two draws."""
    there = np.asarray(np.isfinite(values[:, :, kept]).all(2))
    draws = there.sum(1)
    if not (draws > 1).any():
        return None
    values, there = values[draws > 1], there[draws > 1][:, :, None]
    draws = draws[draws > 1][:, None, None]
    mean = np.where(there, values, 0.0).sum(1, keepdims=True) / draws
    centred = np.where(there, values - mean, 0.0)
    return (centred.transpose(0, 2, 1) @ centred / (draws * (draws - 1))).mean(0)


def _covariance_of_mean(values: np.ndarray) -> np.ndarray | None:
    """Returns the covariance (n, n) of the mean of values (k, n); None for fewer than two."""
    if len(values) < 2:
        return None
    centred = values - values.mean(0)
    return centred.T @ centred / (len(values) * (len(values) - 1))


def _at_least(covariance: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Returns a covariance with each variance at least that given, correlations kept."""
    own = np.diagonal(covariance)
    if (own == 0).all():
        return np.diag(variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(np.maximum(1.0, np.where(own > 0, variance / own, 1.0)))
    return covariance * np.outer(scale, scale)
