"""What the `gn_hessian` table shows of steps really taken, in sentences: their curvature, and what a model leaves out."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.answers import GAUSS_NEWTON, curvature_ratio, measured
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION, full_length, ladder
from hessprobe.reading.finding import Finding
from hessprobe.reading.wording import basis, counted, percent, plus_minus

ALONG = {
    "negative_gradient": "the negative gradient",
    "update": "the update",
    "gauss_newton_step": "the Gauss-Newton step",
    "top_eigenvector": "G's top eigenvector",
    "random": "a random direction",
}
# Of each error: what makes up most of the two, and the label of a headline.
LARGER = {
    BEYOND: ("the loss's higher orders make up", "are the loss's higher orders"),
    LINEARISATION: ("linearising the network makes up", "is linearising the network"),
}


def update_curvature(table: xr.Dataset) -> Finding | None:
    """Returns how much curvature H has along the update, in units of G's, and where it is negative."""
    ratio = curvature_ratio(table)
    if ratio.sizes["step"] == 0 or "update" not in ratio["direction"].values:
        return None
    rows = ratio.isel(step=np.flatnonzero(np.isfinite(ratio.sel(direction="update").values)))
    if rows.sizes["step"] == 0:
        return None
    row, step = rows.isel(step=-1), int(rows["step"][-1])
    value = float(row.sel(direction="update"))
    down = [
        ALONG.get(str(name), str(name))
        for name in row["direction"].values
        if float(row.sel(direction=name)) < 0
    ]
    along = rows.sel(direction="update").values
    among = (
        f"; over {counted(along.size, 'measured step')} between {plus_minus(float(along.min()), None)} and "
        f"{plus_minus(float(along.max()), None)}"
        if along.size > 1
        else ""
    )
    negative = f" The Hessian curves down along {_listed(down)}." if down else ""
    return Finding(
        name="update_curvature",
        sentence=f"Along the update taken at step {step:,}, the Hessian has {plus_minus(value, None)} times the "
        f"Gauss-Newton matrix's curvature{among}.{negative}",
        value=value,
        stderr=None,
        basis=f"exact on {basis(table.sel(step=step), exact=True) or 'its batch'}",
        steps=tuple(int(s) for s in rows["step"].values),
    )


def model_error_of_update(table: xr.Dataset) -> Finding | None:
    """Returns which error dominates Gauss-Newton's model of the update at its full length."""
    return _model_error(table, "update", "model_error_update", "of the model's error along the update")


def model_error_of_step(table: xr.Dataset) -> Finding | None:
    """Returns which error dominates Gauss-Newton's model of its own step."""
    return _model_error(table, "gauss_newton_step", "model_error_gauss_newton_step", "")


def _model_error(table: xr.Dataset, direction: str, name: str, label: str) -> Finding | None:
    rows = ladder(table)
    if rows.sizes["step"] == 0 or direction not in rows["ladder_direction"].values:
        return None
    along = rows.sel(ladder_direction=direction, alpha=full_length(rows))
    along = along.isel(step=np.flatnonzero(np.isfinite(along["share"].values)))
    if along.sizes["step"] == 0:
        return None
    row = along.isel(step=-1)
    step, alpha = int(row["step"]), float(row["alpha"])
    errors = {key: plus_minus(float(row[key]), error_of(row[f"{key}_stderr"])) for key in LARGER}
    promised, real = (plus_minus(float(row["change"].sel(model=key)), None) for key in (GAUSS_NEWTON, "loss"))
    larger = str(row["dominant"].values)
    value, stderr = float(row["share"]), error_of(row["share_stderr"])
    part = value if larger != BEYOND else 1 - value
    verdict = (
        f"{LARGER[larger][0]} {percent(part, stderr)} of the two"
        if larger
        else f"which is larger is not resolved (linearising: {percent(value, stderr)} of the two)"
    )
    if bool(row["cancel"]):
        verdict += ", and they partly cancel"
    length = "" if np.isclose(alpha, 1) else f" at {alpha:g} times its length"
    return Finding(
        name=name,
        sentence=f"Along {ALONG[direction]} at step {step:,}{length}, the loss changes by {real} where Gauss-Newton's "
        f"quadratic says {promised} nats per token: linearising the network leaves out {errors[LINEARISATION]}, the loss's "
        f"higher orders add {errors[BEYOND]}; {verdict}.",
        value=value,
        stderr=stderr,
        basis=f"{basis(table.sel(step=step), exact=True)}; errors over sequences{_solve(table, direction, step)}",
        steps=(step,),
        headline=percent(part, stderr) if label and larger else "",
        label=f"{label} {LARGER[larger][1]}" if label and larger else "",
        resolved=bool(larger),
    )


def error_of(stderr: xr.DataArray) -> float | None:
    """Returns a standard error, or None where there is none to state."""
    value = float(stderr)
    return value if np.isfinite(value) else None


def _solve(table: xr.Dataset, direction: str, step: int) -> str:
    """Returns how well the Gauss-Newton step was solved for, where that is the direction."""
    if direction != "gauss_newton_step":
        return ""
    row = measured(table, "gauss_newton_step_residual", "gauss_newton_step_iterations")
    damping = table.attrs.get("step_damping")
    said = f"; damping {damping:g}" if damping else ""
    if step not in row["step"].values:
        return said
    row = row.sel(step=step)
    count = float(row["gauss_newton_step_iterations"])
    after = f" after {counted(int(count), 'iteration')}" if np.isfinite(count) else ""
    return f"{said}, residual {float(row['gauss_newton_step_residual']):.2g}{after}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
