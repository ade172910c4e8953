"""Figures on groupings for a paper: which pairs gain, how few groups are enough, which blocks matter, how long a step.

Each function returns the figure and the data drawn in it; errors are one standard error.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.answers import jacobi_radius
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, ranked_gains
from hessprobe.pictures.paper import ACCENT, COLUMN, SECOND, STYLE, marker, new, short, stored
from hessprobe.reading.rows import sound_rows

UNRESOLVED = "#999999"
# Of many pairs, the ends of the ranking.
HIGHEST, LOWEST = 12, 4


def merge_gains(study: GroupingStudy) -> tuple[Figure, xr.Dataset]:
    """Returns what joining each pair of layers gains, ranked, drawn, and the pairs drawn (pair,)."""
    _require(study, "merge_gain")
    gains = ranked_gains(study, HIGHEST, LOWEST)
    places = np.arange(gains.sizes["pair"])
    with matplotlib.rc_context(STYLE):
        figure, axes = new(0.5 + 0.15 * max(places.size, 4))
        for resolved, color, face, label in (
            (True, ACCENT, ACCENT, "beyond two errors"),
            (False, UNRESOLVED, "white", "not resolved"),
        ):
            at = np.flatnonzero(gains["resolved"].values.astype(bool) == resolved)
            if at.size:
                values, errors = 100 * gains["gain"].values[at], 100 * gains["stderr"].values[at]
                axes.errorbar(values, at, xerr=errors, fmt="o", color=color, mfc=face, label=label)
        axes.axvline(0, color="#999999", linewidth=0.6, zorder=0)
        names = zip(gains["block"].values, gains["other_block"].values, strict=True)
        axes.set_yticks(places, [f"{short(str(a))} × {short(str(b))}" for a, b in names])
        axes.invert_yaxis()
        axes.set_xlabel("gain over layerwise (%)")
        axes.set_title(_title(study), loc="left")
        axes.legend(loc="lower right")
    return figure, gains


def grouping_curve(study: GroupingStudy) -> tuple[Figure, xr.Dataset]:
    """Returns the share of full's held-out decrease by number of groups, drawn, and those shares (groups,)."""
    _require(study, "captured")
    drawn = study.last[["captured", "captured_stderr", "captured_resolved", "joined"]]
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.7)
        values, errors = 100 * drawn["captured"].values, 100 * drawn["captured_stderr"].values
        axes.errorbar(drawn["groups"].values, values, errors, color=ACCENT, marker="o", capsize=2)
        axes.axhline(100, color="#999999", linewidth=0.6, zorder=0)
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("groups")
        axes.set_ylabel("captured share of full's decrease (%)")
        axes.set_title(_title(study), loc="left")
    return figure, drawn


def importance_over_training(study: GroupingStudy) -> tuple[Figure, xr.Dataset]:
    """Returns each block's importance at the steps studied, drawn, and the numbers drawn (step, block).

    NaN, and blank, where the sketches do not reach the damping; a dot marks what lies beyond two errors.
    """
    _require(study, "importance")
    rows = study.over_training[[n for n in map(str, study.over_training) if n.startswith("importance")]]
    drawn = rows.assign(importance=rows["importance"].where(rows["importance_reached"]))
    values = 100 * drawn["importance"].values.T
    if not np.isfinite(values).any():
        raise UserError("at no step do the sketches reach the damping; nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(0.8 + 0.16 * max(len(values), 5))
        end = float(np.nanmax(np.abs(values)))
        image = axes.imshow(np.ma.masked_invalid(values), cmap="PuOr_r", vmin=-end, vmax=end, aspect="auto")
        at, block = np.nonzero(drawn["importance_resolved"].values)
        axes.plot(at, block, ".", color="black", markersize=2.5)
        axes.set_xticks(range(values.shape[1]), [f"{step}" for step in drawn["step"].values], rotation=45)
        axes.set_yticks(range(len(values)), [short(str(name)) for name in drawn["block"].values])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("step")
        axes.set_title(f"damping {study.damping:g}", loc="left")
        label = "lost when cut off (%)"
        figure.colorbar(image, ax=axes, label=label, pad=0.03).outline.set_visible(False)  # pyright: ignore
    return figure, drawn


def overshoot_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the largest stable layerwise step, 2 / jacobi_radius, with the chosen step sizes, and those radii."""
    radius = jacobi_radius(stored(run, "cross_layer"))
    if radius.sizes["step"] == 0:
        raise UserError("no row of the table 'cross_layer' holds a jacobi_radius; nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        steps, low, high = radius["step"].values, 2 / radius["high"].values, 2 / radius["low"].values
        axes.fill_between(steps, low, high, color=ACCENT, alpha=0.3, linewidth=0)
        axes.plot(steps, low, color=ACCENT, marker=marker(steps.size), label="2 / jacobi_radius")
        axes.plot(steps, high, color=ACCENT, marker=marker(steps.size))
        if "train" in run.children:
            chosen = sound_rows(run["train"].to_dataset(), "step_size")
            if chosen.sizes["step"]:
                axes.plot(
                    chosen["step"], chosen["step_size"], "x", color=SECOND, label="chosen by the line search"
                )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("step size")
        axes.legend()
    return figure, radius


def _require(study: GroupingStudy, answer: str) -> None:
    if not study.has(answer):
        raise UserError(study.reason or study.left_out)


def _title(study: GroupingStudy) -> str:
    return f"step {int(study.last['step']):,}, damping {study.damping:g}"
