"""What a run shows, in sentences: each with a value, its error and what it rests on; nothing within its error.

A difference or a share is claimed beyond two standard errors; a trend also needs four measured steps. What does
not reach that is said to be unresolved, which is a result too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from hessprobe.analysis.coupling import coupling_by_distance, cross_share, off_block_energy, strongest_pairs
from hessprobe.analysis.rows import sound_rows
from hessprobe.analysis.training import measuring_costs, summarize_training
from hessprobe.analysis.trend import STANDARD_ERRORS, Trend, trend
from hessprobe.analysis.wording import basis, counted, percent, plus_minus


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence with the number it states; `stderr` is None where the number is exact on its batch."""

    name: str
    sentence: str
    value: float
    stderr: float | None
    basis: str
    steps: tuple[int, ...]
    resolved: bool = True


def findings(run: xr.DataTree) -> list[Finding]:
    """Returns the findings of a run, most important first; empty where nothing was recorded yet."""
    tables = {name: run[name].to_dataset() for name in run.children}
    found: list[Finding | None] = []
    if "cross_layer" in tables:
        asked: tuple[Callable[[xr.Dataset], Finding | None], ...] = (
            _off_block, _cross_share, _strongest_pair, _distance, _off_block_trend, _cross_share_trend,
        )  # fmt: skip
        found += [ask(tables["cross_layer"]) for ask in asked]
    if "train" in tables:
        found += [_held_out(tables["train"])]
    found += [_cost(run)]
    return [finding for finding in found if finding is not None]


def _off_block(table: xr.Dataset) -> Finding | None:
    rows = sound_rows(table, "off_block_energy")
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    step, value, stderr = int(row["step"]), float(row["off_block_energy"]), float(row["off_block_energy_stderr"])
    resolved = abs(value) > STANDARD_ERRORS * stderr
    what = percent(value, stderr)
    sentence = (
        f"At step {step:,}, {what} of the Gauss-Newton matrix's squared norm lies between layers, where a "
        "layerwise method does not look."
        if resolved
        else f"At step {step:,}, the share of the Gauss-Newton matrix's squared norm between layers ({what}) is not "
        "resolved from zero."
    )
    return Finding(
        name="off_block_energy", sentence=sentence, value=value, stderr=stderr, basis=basis(row), steps=(step,),
        resolved=resolved,
    )  # fmt: skip


def _update_shares(table: xr.Dataset) -> tuple[xr.Dataset, np.ndarray]:
    """Returns the rows with a cross share along the update, and the shares (step,)."""
    rows = sound_rows(table, "step_curvature")
    if rows.sizes["step"] == 0 or "update" not in rows["direction"].values:
        return rows.isel(step=slice(0, 0)), np.empty(0)
    shares = cross_share(rows["step_curvature"].sel(direction="update")).values
    keep = np.flatnonzero(np.isfinite(shares))
    return rows.isel(step=keep), shares[keep]


def _cross_share(table: xr.Dataset) -> Finding | None:
    rows, shares = _update_shares(table)
    if shares.size == 0:
        return None
    row, share = rows.isel(step=-1), float(shares[-1])
    step = int(row["step"])
    seen = percent(1 - share)
    reading = (
        f"a block-diagonal model sees {seen} of this step's curvature"
        if share >= 0
        else f"layers cancel, and a block-diagonal model sees {seen} of this step's curvature"
    )
    among = (
        f"; over {counted(shares.size, 'measured step')} the share lies between {percent(float(shares.min()))} "
        f"and {percent(float(shares.max()))}"
        if shares.size > 1
        else ""
    )
    return Finding(
        name="cross_share_update",
        sentence=f"Along the update taken at step {step:,}, terms between layers make up {percent(share)} of the "
        f"curvature d·Gd: {reading}{among}.",
        value=share, stderr=None, basis=f"exact on {basis(row)}", steps=tuple(int(s) for s in rows["step"].values),
    )  # fmt: skip


def _strongest_pair(table: xr.Dataset) -> Finding | None:
    rows = sound_rows(table, "coupling")
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    pairs = strongest_pairs(row, count=row.sizes["block"] ** 2)
    if pairs.sizes["pair"] == 0:
        return None
    values, errors = pairs["coupling"].values, pairs["coupling_stderr"].values
    value, stderr, step = float(values[0]), float(errors[0]), int(row["step"])
    name = f"{pairs['block'].values[0]} and {pairs['other_block'].values[0]}"
    if not value > STANDARD_ERRORS * stderr:
        sentence = f"At step {step:,}, no pair of layers has a coupling resolved from zero."
        resolved = False
    else:
        # A single probe set serves all pairs; adding variances ignores their correlation, so two errors are added.
        rivals = int((values[0] - values[1:] <= STANDARD_ERRORS * (errors[0] + errors[1:])).sum())
        resolved = rivals == 0
        rest = "" if resolved else f"; {counted(rivals, 'other pair')} cannot be told apart from it"
        sentence = (
            f"At step {step:,}, the most strongly coupled layers are {name}, at {plus_minus(value, stderr)} of "
            f"the possible 1{rest}."
        )
    return Finding(
        name="strongest_pair", sentence=sentence, value=value, stderr=stderr, basis=basis(row), steps=(step,),
        resolved=resolved,
    )  # fmt: skip


def _distance(table: xr.Dataset) -> Finding | None:
    rows = sound_rows(table, "coupling")
    by_distance = coupling_by_distance(rows)
    measured = by_distance.where(by_distance["distance"] >= 1, drop=True)
    if measured.sizes["step"] == 0 or measured.sizes["distance"] < 2:
        return None
    near, far = measured.isel(step=-1, distance=0), measured.isel(step=-1, distance=-1)
    difference = float(near["coupling"] - far["coupling"])
    stderr = float(near["coupling_stderr"] + far["coupling_stderr"])
    if not np.isfinite(difference):
        return None
    step = int(near["step"])
    numbers = [plus_minus(float(point["coupling"]), float(point["coupling_stderr"])) for point in (near, far)]
    resolved = abs(difference) > STANDARD_ERRORS * stderr
    verdict = ("falls with" if difference > 0 else "grows with") if resolved else "does not resolvably depend on"
    return Finding(
        name="coupling_by_distance",
        sentence=f"At step {step:,}, coupling {verdict} layer distance: {numbers[0]} between layers "
        f"{int(near['distance'])} apart, {numbers[1]} between layers {int(far['distance'])} apart.",
        value=difference, stderr=stderr, basis=basis(rows.isel(step=-1)), steps=(step,), resolved=resolved,
    )  # fmt: skip


def _over_training(name: str, quantity: str, line: Trend | None, what_it_rests_on: str) -> Finding | None:
    if line is None:
        return None
    span = f"from step {line.first_step:,} to {line.last_step:,}"
    change = plus_minus(100 * line.change, 100 * line.stderr, "percentage points")
    rises = "rises" if line.change > 0 else "falls"
    sentence = (
        f"Over training, {quantity} {rises} by {change.removeprefix('-')} {span}."
        if line.resolved
        else f"Over training, {quantity} shows no resolved trend {span} ({change})."
    )
    return Finding(
        name=name, sentence=sentence, value=line.change, stderr=line.stderr,
        basis=f"line through {counted(line.rows, 'measured step')}; {what_it_rests_on} each",
        steps=(line.first_step, line.last_step), resolved=line.resolved,
    )  # fmt: skip


def _off_block_trend(table: xr.Dataset) -> Finding | None:
    rows = off_block_energy(table)
    line = trend(rows["step"].values, rows["off_block_energy"].values, rows["off_block_energy_stderr"].values) \
        if "off_block_energy" in rows else None  # fmt: skip
    last = sound_rows(table, "off_block_energy").isel(step=slice(-1, None)).squeeze("step", drop=False)
    return _over_training("off_block_energy_trend", "the share between layers", line, basis(last)) if line else None


def _cross_share_trend(table: xr.Dataset) -> Finding | None:
    rows, shares = _update_shares(table)
    line = trend(rows["step"].values, shares)
    what = "the share of the update's curvature between layers"
    return _over_training("cross_share_trend", what, line, basis(rows.isel(step=-1))) if line else None


def _held_out(table: xr.Dataset) -> Finding | None:
    summary = summarize_training(table)
    if summary is None or summary.best_step is None:
        return None
    first, best = summary.first_held_out_loss, summary.best_held_out_loss
    if not best < first:
        sentence = f"The held-out loss has not fallen below its first value, {first:.4g} nats per token."
    else:
        sentence = (
            f"The held-out loss fell from {first:.4g} to {best:.4g} nats per token, its best, at step "
            f"{summary.best_step:,}."
        )
    return Finding(
        name="held_out_loss", sentence=sentence, value=best, stderr=None, resolved=best < first,
        basis=f"{counted(summary.steps, 'step')}, {summary.tokens:,} training tokens", steps=(summary.best_step,),
    )  # fmt: skip


def _cost(run: xr.DataTree) -> Finding | None:
    costs = measuring_costs(run)
    share = float(costs["share_of_run"].sum(skipna=False)) if costs.sizes["table"] else np.nan
    if not np.isfinite(share):
        return None
    rows, seconds = int(costs["rows"].sum()), float(costs["seconds"].sum())
    return Finding(
        name="measuring_cost",
        sentence=f"Measuring took {percent(share)} of the run's time: {seconds:,.1f} s for {counted(rows, 'row')}.",
        value=share, stderr=None, basis="wall clock", steps=(),
    )  # fmt: skip
