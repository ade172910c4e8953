"""Figures for a paper: one style, column width, text that stays text in PDF, colour-blind-safe colours.

Each function returns the figure and the data drawn in it.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.answers import coupling, off_block_energy
from hessprobe.instruments.cross_layer.answers import coupling_by_distance as means_by_distance
from hessprobe.instruments.cross_layer.answers import cross_share as cross_share_of
from hessprobe.pictures.paper import ACCENT, COLUMN, SECOND, STYLE, marker, new, plain, short, stored
from hessprobe.reading.rows import sound_rows

DIRECTIONS = {
    "update": ("along the update", ACCENT, "-"),
    "negative_gradient": ("along −gradient", SECOND, "--"),
}


def coupling_heatmap(run: xr.DataTree, step: int | None = None) -> tuple[Figure, xr.Dataset]:
    """Returns the coupling of every pair of layers at one step, drawn, and the row drawn (diagonal blank).

    Args:
        run: an opened run.
        step: a measured step; default the last.

    Raises:
        UserError: no such table, no measured row, or a step that was not measured.
    """
    rows = coupling(stored(run, "cross_layer"))
    row = _row(rows, step)
    diagonal = np.eye(row.sizes["block"], dtype=bool)
    drawn = row.where(xr.DataArray(~diagonal, dims=("block", "other_block")))
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.9)
        values = np.ma.masked_invalid(drawn["coupling"].values)
        image = axes.imshow(values, cmap="cividis", vmin=0.0)
        names = [short(str(name)) for name in row["block"].values]
        # Beyond some thirty labels a column has no room for every name.
        ticks = range(0, len(names), max(1, len(names) // 30))
        axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90)
        axes.set_yticks(ticks, [names[i] for i in ticks])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"step {int(row['step']):,}", loc="left")
        figure.colorbar(image, ax=axes, label="coupling", shrink=0.85, pad=0.03).outline.set_visible(False)  # pyright: ignore
    return figure, drawn


def coupling_by_distance(run: xr.DataTree, step: int | None = None) -> tuple[Figure, xr.Dataset]:
    """Returns the mean coupling of pairs against their layer distance at one step, drawn, and the means drawn."""
    means = means_by_distance(stored(run, "cross_layer"))
    row = _row(means, step)
    row = row.isel(distance=np.flatnonzero(row["distance"].values > 0))
    if row.sizes["distance"] == 0:
        raise UserError("these blocks have no depth (embedding, block.N, head); no distance to draw against")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        errors = row["coupling_stderr"].values
        axes.errorbar(
            row["distance"].values, row["coupling"].values, errors, color=ACCENT, marker="o", capsize=2
        )
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layers apart")
        axes.set_ylabel("coupling")
        axes.set_title(f"step {int(row['step']):,}", loc="left")
    return figure, row


def off_block_energy_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the share of |G|_F^2 between layers over training with its errors, drawn, and those shares."""
    energy = off_block_energy(stored(run, "cross_layer"))
    if energy.sizes["step"] == 0:
        raise UserError("no row of the table 'cross_layer' holds an off_block_energy; nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        value, stderr = 100 * energy["off_block_energy"], 100 * energy["off_block_energy_stderr"]
        axes.fill_between(
            energy["step"], value - stderr, value + stderr, color=ACCENT, alpha=0.2, linewidth=0
        )
        axes.plot(energy["step"], value, color=ACCENT, marker=marker(value.size))
        axes.set_xlabel("step")
        axes.set_ylabel("off-block energy of G (%)")
    return figure, energy


def cross_share_over_training(run: xr.DataTree) -> tuple[Figure, xr.DataArray]:
    """Returns the share of d.Gd between layers over training, drawn, and those shares (step, direction)."""
    rows = sound_rows(stored(run, "cross_layer"), "step_curvature")
    if rows.sizes["step"] == 0:
        raise UserError("no row of the table 'cross_layer' holds a step_curvature; nothing to draw")
    shares = cross_share_of(rows["step_curvature"]).compute()
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        for direction in shares["direction"].values:
            label, color, dash = DIRECTIONS.get(str(direction), (plain(str(direction)), "#666666", ":"))
            line = shares.sel(direction=direction)
            axes.plot(line["step"], 100 * line, dash, color=color, marker=marker(line.size), label=label)
        axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
        axes.set_xlabel("step")
        axes.set_ylabel("cross share of d·Gd (%)")
        axes.legend()
    return figure, shares


def _row(rows: xr.Dataset, step: int | None) -> xr.Dataset:
    measured = rows["step"].values
    if measured.size == 0:
        raise UserError("no row of the table 'cross_layer' holds a number; nothing to draw")
    if step is None:
        return rows.isel(step=-1)
    if step not in measured:
        raise UserError(f"step {step} was not measured; measured: {', '.join(str(s) for s in measured[:20])}")
    return rows.sel(step=step)
