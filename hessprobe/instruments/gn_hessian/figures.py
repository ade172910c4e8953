"""Figures on Gauss-Newton against Hessian for a paper: the gap over training, spectra, and what a step's model leaves out.

Each function returns the figure and the data drawn in it; errors are one standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from hessprobe.errors import UserError
from hessprobe.instruments.gn_hessian.answers import (
    GAUSS_NEWTON,
    HESSIAN,
    MATRICES,
    RESIDUAL,
    block_gap,
    curvature_ratio,
    gn_gap,
)
from hessprobe.instruments.gn_hessian.charts import scale_end
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION, ladder
from hessprobe.instruments.gn_hessian.spectrum import extremes, smoothed_density
from hessprobe.instruments.gn_hessian.step_findings import ALONG
from hessprobe.pictures.paper import ACCENT, COLUMN, SECOND, STYLE, marker, new, plain, short, stored
from hessprobe.reading.rows import sound_rows

TABLE = "gn_hessian"
GREY = "#777777"
LOOKS = {GAUSS_NEWTON: ("G", ACCENT, "-"), HESSIAN: ("H", SECOND, "-"), RESIDUAL: ("H − G", GREY, ":")}
# Okabe and Ito's, told apart by dash too.
DIRECTION_LOOKS = {
    "update": ("#0072b2", "-"),
    "gauss_newton_step": ("#d55e00", "-"),
    "negative_gradient": ("#009e73", "--"),
    "top_eigenvector": ("#cc79a7", "-."),
    "random": (GREY, ":"),
}
ERRORS = {
    LINEARISATION: ("linearising the network", SECOND, "o"),
    BEYOND: ("the loss's higher orders", ACCENT, "s"),
}

Draw = Callable[[], tuple[Figure, xr.Dataset | xr.DataArray]]


def discrepancy_drawings(run: xr.DataTree) -> dict[str, Draw]:
    """Returns {file name: what draws it} of all these figures."""
    draws: dict[str, Draw] = {
        "gn_gap": partial(gap_over_training, run),
        "gn_block_gap": partial(block_gap_over_training, run),
        "gn_density": partial(density, run),
        "gn_extremes": partial(extremes_over_training, run),
        "gn_directions": partial(curvature_along_directions, run),
        "gn_model_errors": partial(model_errors, run),
    }
    return draws


def gap_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns ||H - G|| / ||G|| and the cosine of H and G over training, drawn, and those numbers (step)."""
    gap = gn_gap(stored(run, TABLE))
    _require(gap, "gn_gap")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        for name, label, color, dash in (
            ("gn_gap", "‖H − G‖ / ‖G‖", ACCENT, "-"),
            ("cosine", "cosine of H and G", SECOND, "--"),
        ):
            axes.errorbar(
                gap["step"].values,
                gap[name].values,
                gap[f"{name}_stderr"].values,
                color=color,
                linestyle=dash,
                marker=marker(gap.sizes["step"]),
                capsize=2,
                label=label,
            )
        axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
        axes.set_xlabel("step")
        axes.legend()
    return figure, gap


def block_gap_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the gap of every diagonal block over training, drawn, and those gaps (step, block)."""
    rows = block_gap(stored(run, TABLE))
    _require(rows, "block_gn_gap")
    values = rows["gn_gap"].values.T
    with matplotlib.rc_context(STYLE):
        figure, axes = new(0.8 + 0.16 * max(len(values), 5))
        image = axes.imshow(
            np.ma.masked_invalid(values),
            cmap="cividis",
            vmin=0.0,
            vmax=scale_end(rows["gn_gap"]),
            aspect="auto",
        )
        steps = rows["step"].values
        ticks = range(0, steps.size, max(1, steps.size // 10))
        axes.set_xticks(ticks, [f"{steps[i]}" for i in ticks], rotation=45)
        axes.set_yticks(range(len(values)), [short(str(name)) for name in rows["block"].values])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("step")
        label = "‖(H − G)$_{bb}$‖ / ‖G$_{bb}$‖"
        figure.colorbar(image, ax=axes, label=label, pad=0.03).outline.set_visible(False)  # pyright: ignore
    return figure, rows


def density(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the spectral densities of G, H and H - G at the last row, drawn, and those densities.

    The band reaches from the lowest to the highest probe.
    """
    rows = sound_rows(stored(run, TABLE), "ritz_value")
    found = smoothed_density(rows.isel(step=-1)) if rows.sizes["step"] else None
    if found is None:
        raise UserError(f"no row of the table {TABLE!r} holds a ritz_value; nothing to draw")
    floor = 1e-9 * float(found["density"].max())
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        for name in MATRICES:
            label, color, dash = LOOKS[name]
            line = found.sel(matrix=name)
            at = line["eigenvalue"].values
            axes.fill_between(
                at, np.maximum(line["low"], floor), np.maximum(line["high"], floor), color=color, alpha=0.2,
                linewidth=0,
            )  # fmt: skip
            axes.plot(at, line["density"].where(line["density"] > floor), dash, color=color, label=label)
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
        axes.set_xlabel("eigenvalue (nats)")
        axes.set_ylabel("density")
        axes.set_title(f"step {int(rows['step'][-1]):,}", loc="left")
        axes.legend()
    return figure, found


def extremes_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the extreme Ritz values of G and H over training with their residuals, drawn, and those values."""
    ends = extremes(stored(run, TABLE))
    _require(ends, "lambda_max")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        for matrix in (GAUSS_NEWTON, HESSIAN):
            label, color, _ = LOOKS[matrix]
            for name, dash, words in (("lambda_max", "-", "largest"), ("lambda_min", "--", "smallest")):
                axes.errorbar(
                    ends["step"].values,
                    ends[name].sel(matrix=matrix).values,
                    ends[f"{name}_residual"].sel(matrix=matrix).values,
                    color=color,
                    linestyle=dash,
                    marker=marker(ends.sizes["step"]),
                    capsize=2,
                    label=f"{label}, {words}",
                )
        axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
        axes.set_xlabel("step")
        axes.set_ylabel("eigenvalue (nats)")
        axes.legend(ncols=2)
    return figure, ends


def curvature_along_directions(run: xr.DataTree) -> tuple[Figure, xr.DataArray]:
    """Returns d.Hd / d.Gd along every direction over training, drawn, and those ratios (step, direction)."""
    ratio = curvature_ratio(stored(run, TABLE))
    if not np.isfinite(ratio.values).any():
        raise UserError(f"no row of the table {TABLE!r} holds a direction_curvature; nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.7)
        for name in ratio["direction"].values:
            color, dash = DIRECTION_LOOKS.get(str(name), (GREY, "-"))
            line = ratio.sel(direction=name)
            label = plain(ALONG.get(str(name), str(name)))
            axes.plot(line["step"], line, dash, color=color, marker=marker(line.size), label=label)
        axes.axhline(1, color="#999999", linewidth=0.6, zorder=0)
        axes.set_xlabel("step")
        axes.set_ylabel("d·Hd / d·Gd")
        figure.legend(loc="outside upper center", ncols=2, fontsize=6)
    return figure, ratio


def model_errors(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the two errors of Gauss-Newton's quadratic at the last row against the step length, and those errors.

    A panel for each direction of the ladder that the last row holds.
    """
    rows = ladder(stored(run, TABLE))
    _require(rows, "change")
    row = rows.isel(step=-1)
    known = np.flatnonzero(np.isfinite(row[LINEARISATION].values).any(-1))
    row = row.isel(ladder_direction=known)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, COLUMN * 0.45 * max(known.size, 1) + 0.3), layout="constrained")
        panels = figure.subplots(max(known.size, 1), 1, sharex=True, squeeze=False)[:, 0]
        for axes, name in zip(panels, row["ladder_direction"].values, strict=False):
            for key, (label, color, point) in ERRORS.items():
                values, errors = (row[n].sel(ladder_direction=name).values for n in (key, f"{key}_stderr"))
                axes.errorbar(
                    row["alpha"].values, values, errors, color=color, marker=point, capsize=2, label=label
                )
            axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
            axes.set_title(f"along {plain(ALONG.get(str(name), str(name)))}", loc="left")
            axes.set_ylabel("nats per token")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(row["alpha"].values.tolist()))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[0].legend(loc="best")
        panels[-1].set_xlabel(f"step length α (step {int(row['step']):,})")
    return figure, row


def _require(rows: xr.Dataset, name: str) -> None:
    if rows.sizes["step"] == 0:
        raise UserError(f"no row of the table {TABLE!r} holds a {name}; nothing to draw")
