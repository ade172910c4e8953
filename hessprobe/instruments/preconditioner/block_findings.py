"""What the `preconditioner` table says of single layers, in sentences: who loses most, what own step sizes would buy."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.preconditioner.answers import UPDATE, practical
from hessprobe.instruments.preconditioner.blocks import block_losses, block_steps, damping_of
from hessprobe.instruments.preconditioner.decrease_ratios import closest
from hessprobe.reading.finding import Finding
from hessprobe.reading.trend import STANDARD_ERRORS
from hessprobe.reading.wording import counted, percent, plus_minus


def step_sizes(rows: xr.Dataset) -> Finding | None:
    """Returns what a step size for each layer would buy the run's update, at the last measured step."""
    name = _subject(rows)
    if name is None:
        return None
    row = rows.isel(step=-1)
    steps = block_steps(row.sel(candidate=[name])).isel(candidate=0)
    gains = steps["gain"].sel(found="other sequences")
    errors = steps["gain_stderr"].sel(found="other sequences")
    value, stderr = float(gains.sel(known="together")), float(errors.sel(known="together"))
    if not np.isfinite(value):
        return None
    step, resolved = int(row["step"]), abs(value - 1) > STANDARD_ERRORS * stderr
    wanted = [
        f"{block} {plus_minus(float(one), float(error))} times"
        for block, one, error, beyond in zip(
            steps["block"].values, steps["multiplier"].values, steps["multiplier_stderr"].values,
            steps["resolved"].values, strict=True,
        )
        if beyond
    ]  # fmt: skip
    alone = plus_minus(float(gains.sel(known="alone")), float(errors.sel(known="alone")))
    many = f"{', '.join(wanted[:3])}{' and others' if len(wanted) > 3 else ''}"
    asks = (
        f"; beyond errors it asks for other steps in {many}"
        if wanted
        else "; no single layer asks for another"
    )
    said = (
        f"a step size for each layer would {'raise' if value > 1 else 'lower'} the held-out decrease of {_called(name)} "
        f"to {plus_minus(value, stderr)} times that of its best single one ({alone} with each layer tuned alone){asks}"
        if resolved
        else f"a step size for each layer buys {_called(name)} nothing resolved: {plus_minus(value, stderr)} times the "
        f"held-out decrease of its best single one ({alone} with each layer tuned alone)"
    )
    return Finding(
        name="step_size_per_layer",
        sentence=f"At step {step:,}, {said}.",
        value=value,
        stderr=error_of(errors.sel(known="together")),
        basis="step sizes found and judged on different held-out sequences, "
        + basis_of(rows.isel(step=[-1]), damping_of(rows), 1),
        steps=(step,),
        resolved=bool(resolved),
    )


def loses_most(rows: xr.Dataset) -> Finding | None:
    """Returns the layer in which the run's update leaves most of what is to be had, at the last measured step."""
    name = _subject(rows)
    if name is None:
        return None
    losses = block_losses(rows.isel(step=[-1])).isel(step=0).sel(candidate=name)
    lost = losses["lost"].values
    if not np.isfinite(lost).any():
        return None
    at = int(np.nanargmax(lost))
    block, step = str(rows["block"].values[at]), int(losses["step"])
    return Finding(
        name="block_loses_most",
        sentence=f"At step {step:,}, {_called(name)} leaves most in {block}: {percent(float(lost[at]))} of what the best "
        f"steps within single layers would gain, {percent(float(np.nansum(lost)))} in all layers; within {block} it is "
        f"{percent(float(losses['efficiency'].values[at]))} efficient.",
        value=float(lost[at]),
        stderr=None,
        basis=f"exact on {int(rows['curvature_sequences'].values[-1])} curvature sequences, damping {damping_of(rows):g}",
        steps=(step,),
    )


def _subject(rows: xr.Dataset) -> str | None:
    """Returns the candidate that block-by-block findings speak of: the run's update, else the best practical one."""
    if UPDATE in rows["candidate"].values:
        if np.isfinite(rows["block_slope"].isel(step=-1).sel(candidate=UPDATE).values).all():
            return UPDATE
    found = closest(rows, practical(rows["candidate"].values))
    return None if found is None else found[0]


def _called(name: str) -> str:
    return "the run's own update" if name == UPDATE else name


def error_of(value: xr.DataArray) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def basis_of(rows: xr.Dataset, damping: float, steps: int, *solved: str) -> str:
    """Returns what held-out figures rest on; `solved` names the candidates whose solves must have ended."""
    folds, draws = rows.sizes["fold"], rows.sizes["draw"]
    said = [counted(steps, "measured step"), counted(draws, "draw") + " of curvature batches"]
    held_out = int(rows.attrs.get("held_out_sequences", folds))
    said.append(f"{held_out} held-out sequences in {counted(folds, 'fold')}, damping {damping:g}")
    largest, wanted = largest_residual(rows, damping, *solved), float(rows.attrs.get("cg_tolerance", np.inf))
    if largest > wanted:
        said.append(f"solves cut off at residuals up to {largest:.2g}, where {wanted:g} was wanted")
    return "; ".join([", ".join(said[:3]), *said[3:]])


def largest_residual(rows: xr.Dataset, damping: float, *solved: str) -> float:
    """Returns the largest relative residual of candidates' solves at one damping, and of the optimum's; NaN for none."""
    names = [name for name in solved if name in rows["candidate"].values]
    own = np.ravel(rows["solver_residual"].sel(candidate=names, damping=damping).values)
    values = np.r_[own, np.ravel(rows["optimal_residual_held_out"].sel(damping=damping).values)]
    return float(np.nanmax(values)) if np.isfinite(values).any() else np.nan
