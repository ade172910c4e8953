"""A comparison as figures for a paper: loss against what was spent, bars of steps to the target, learning rates.

Each function returns the figure and the data drawn in it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessprobe.comparison.charts import SPENT, broken, swept
from hessprobe.comparison.compared import Comparison, spent
from hessprobe.comparison.findings import steps_said
from hessprobe.comparison.page import best_groups
from hessprobe.errors import UserError
from hessprobe.pictures.paper import COLUMN, STYLE, save

# Okabe and Ito's colours without the yellow, which is lost on white; the dash tells the eighth from the first.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
DASHES = ("-", "--", ":", "-.")


def loss_against(comparison: Comparison, measure: str = "steps") -> tuple[Figure, xr.Dataset]:
    """Returns held-out loss against what was spent, drawn, and the curves (run, evaluation), NaN beyond a run's end.

    Args:
        comparison: what to draw: each variant at its best learning rate, a line a seed.
        measure: steps, tokens_with_line_search or gradient_equivalents.
    """
    groups = best_groups(comparison)
    drawn: list[xr.Dataset] = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _new(COLUMN * 0.7)
        for number in range(groups.sizes["group"]):
            group = groups.isel(group=number)
            members = np.flatnonzero(comparison.runs["group"].values == int(group["group"]))
            for first, run in enumerate(comparison.runs["run"].values[members]):
                curve = comparison.curves[str(run)]
                x, loss = spent(curve, measure), curve["held_out_loss"].values
                label = None if first else _plain(str(group["label"].values))
                axes.plot(x, loss, _dash(number), color=_color(number), linewidth=0.9, label=label)
                columns = {measure: ("evaluation", x), "held_out_loss": ("evaluation", loss)}
                drawn.append(xr.Dataset(columns).expand_dims(run=[str(run)]))
        axes.axhline(comparison.target, color="#999999", linewidth=0.6, linestyle=":", zorder=0)
        axes.set_xlabel(SPENT[measure])
        axes.set_ylabel("held-out loss (nats per token)")
        # Above the curves, not over them.
        figure.legend(loc="outside upper center", ncols=2, fontsize=6, handlelength=1.2, columnspacing=1.0)
    longest = max(curve.sizes["evaluation"] for curve in drawn)
    padded = [c.pad(evaluation=(0, longest - c.sizes["evaluation"]), constant_values=np.nan) for c in drawn]
    return figure, xr.concat(padded, dim="run")


def steps_to_target(comparison: Comparison) -> tuple[Figure, xr.Dataset]:
    """Returns a bar a variant at its best learning rate, with the range over seeds, and the groups drawn."""
    groups = best_groups(comparison)
    steps = groups.sel(measure="steps")
    means, places = steps["mean"].values, np.arange(groups.sizes["group"])
    with matplotlib.rc_context(STYLE):
        figure, axes = _new(0.45 + 0.28 * max(3, places.size))
        drawn = np.nan_to_num(means)
        axes.barh(places, drawn, height=0.65, color=[_color(n) for n in range(places.size)])
        spread = np.nan_to_num([means - steps["least"].values, steps["most"].values - means])
        several = np.flatnonzero(np.isfinite(means) & (groups["seeds"].values > 1))
        axes.errorbar(
            means[several],
            places[several],
            xerr=spread[:, several],
            fmt="none",
            color="#222222",
            linewidth=0.8,
            capsize=2,
        )
        for place in places:
            end = drawn[place] + spread[1, place]
            axes.annotate(
                steps_said(groups.isel(group=place)),
                (end, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.set_yticks(places, [broken(_plain(str(label)), "\n") for label in groups["label"].values])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * max(1.0, *(drawn + spread[1])))  # room for the numbers at the bars' ends
        axes.set_xlabel(f"steps to {comparison.target:.6g} nats per token")
    return figure, groups


def learning_rates(comparison: Comparison) -> tuple[Figure, xr.Dataset]:
    """Returns steps to the target against learning rate, drawn, and the groups drawn.

    Raises:
        UserError: no variant reached the target at two learning rates.
    """
    groups = best_groups(comparison)
    drawn: list[xr.Dataset] = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _new(COLUMN * 0.7)
        for number in range(groups.sizes["group"]):
            best = groups.isel(group=number)
            sweep = swept(comparison, int(best["variant"]))
            if sweep.sizes["group"] < 2:
                continue
            steps = sweep.sel(measure="steps")
            axes.errorbar(
                sweep["learning_rate"].values,
                steps["mean"].values,
                yerr=np.nan_to_num(steps["stderr"].values),
                fmt=_dash(number),
                marker="o",
                color=_color(number),
                capsize=2,
                label=_plain(str(best["label"].values)),
            )
            drawn.append(sweep)
        if not drawn:
            raise UserError("no method reached the target at two learning rates; nothing to draw")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("steps to the target")
        axes.legend()
    return figure, xr.concat(drawn, dim="group")


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes every figure of a comparison as PDF and PNG into a folder and returns the files written."""
    figures = {f"loss_against_{measure}": loss_against(comparison, measure)[0] for measure in SPENT}
    figures["steps_to_target"] = steps_to_target(comparison)[0]
    if any(
        swept(comparison, variant).sizes["group"] > 1 for variant in np.unique(comparison.groups["variant"])
    ):
        figures["learning_rates"] = learning_rates(comparison)[0]
    return [path for name, figure in figures.items() for path in save(figure, folder, name)]


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.add_subplot()


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _dash(number: int) -> str:
    return DASHES[number // len(COLORS) % len(DASHES)]


def _plain(name: str) -> str:
    """Returns a name without matplotlib's math: a dollar sign would start a formula."""
    return name.replace("$", r"\$")
