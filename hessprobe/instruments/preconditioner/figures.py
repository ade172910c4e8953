"""Figures on preconditioners for a paper: when pairs of layers pay, the scoreboard, and what each layer loses.

Each function returns the figure and the data drawn in it; errors are one standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.answers import (
    LAYERWISE,
    efficiency,
    preconditioner_rows,
    scoreboard,
)
from hessprobe.instruments.preconditioner.blocks import block_losses, block_steps
from hessprobe.instruments.preconditioner.decrease_ratios import cross_layer_pays, decrease_ratios
from hessprobe.pictures.paper import ACCENT, COLUMN, SECOND, STYLE, marker, new, plain, short, stored

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5d656d")
DASHES = ("-", "--", ":")
Drawing = tuple[Figure, xr.Dataset]


def preconditioner_drawings(run: xr.DataTree) -> dict[str, Callable[[], Drawing]]:
    """Returns {file name: function that draws it} of every figure on preconditioners."""
    functions = (
        layerwise_over_full, preconditioner_scoreboard, over_layerwise, efficiency_over_training, block_efficiency,
        block_step_gains, block_step_sizes,
    )  # fmt: skip
    return {function.__name__: partial(function, run) for function in functions}


def layerwise_over_full(run: xr.DataTree) -> Drawing:
    """Returns layerwise over full Gauss-Newton by curvature batch and damping, drawn, and `cross_layer_pays`."""
    pays = cross_layer_pays(stored(run, "preconditioner"))
    if pays.sizes["damping"] == 0 or not np.isfinite(pays["ratio"].values).any():
        raise UserError(
            "no row of the table 'preconditioner' holds layerwise_gn beside full_gn; nothing to draw"
        )
    sizes = pays["curvature_sequences"].values
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.75)
        for i, damping in enumerate(pays["damping"].values):
            each, color = pays.isel(damping=i), COLORS[i % len(COLORS)]
            axes.errorbar(
                sizes,
                each["ratio"],
                each["stderr"],
                color=color,
                marker="o",
                capsize=2,
                label=f"damping {damping:g}",
            )
            axes.errorbar(
                sizes, each["own_ratio"], each["own_stderr"], color=color, linestyle=":", linewidth=0.9
            )
        axes.plot([], [], ":", color="#666666", linewidth=0.9, label="on its own batch")
        axes.axhline(1, color="#999999", linewidth=0.6, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("curvature sequences")
        axes.set_ylabel("decrease, layerwise / full")
        axes.legend()
    return figure, pays


def preconditioner_scoreboard(run: xr.DataTree) -> Drawing:
    """Returns every candidate's efficiency at the last measured step, drawn, and the scoreboard, best first."""
    board = scoreboard(_rows(run))
    board = board.isel(candidate=np.argsort(-board["held_out"].values, kind="stable"))
    _require(board["held_out"], "an efficiency")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(0.6 + 0.17 * board.sizes["candidate"])
        places = np.arange(board.sizes["candidate"])
        looks = (("own", "own batch", SECOND, "white"), ("held_out", "held out", ACCENT, ACCENT))
        for name, label, color, face in looks:
            values, errors = (100 * board[key].values for key in (name, f"{name}_stderr"))
            axes.errorbar(values, places, xerr=errors, fmt="o", color=color, mfc=face, label=label)
        _rows_named(axes, board["candidate"].values)
        axes.set_xlim(left=0)
        axes.set_xlabel("efficiency (%)")
        axes.set_title(f"step {int(board['step']):,}, damping {float(board['damping']):g}", loc="left")
        figure.legend(loc="outside lower center", ncols=2)
    return figure, board


def over_layerwise(run: xr.DataTree) -> Drawing:
    """Returns each candidate's held-out decrease over layerwise's by curvature batch, at the first damping, and those."""
    drawn = decrease_ratios(_rows(run)).isel(damping=0)[["ratio", "stderr"]]
    _require(drawn["ratio"], "a decrease beside layerwise_gn")
    drawn = drawn.isel(candidate=np.argsort(-drawn["ratio"].values[:, -1], kind="stable"))
    drawn = drawn.sel(candidate=[name for name in drawn["candidate"].values if name != LAYERWISE])
    labels = [f"{size:,}" for size in drawn["curvature_sequences"].values]
    with matplotlib.rc_context(STYLE):
        figure = _ratio_grid(
            drawn["ratio"].values, drawn["candidate"].values, labels, "held-out decrease / layerwise"
        )
        axes = figure.axes[0]
        row, column = np.nonzero(np.abs(drawn["ratio"].values - 1) > 2 * drawn["stderr"].values)
        axes.plot(column, row, ".", color="black", markersize=2.5)
        axes.set_xlabel("curvature sequences")
        axes.set_title(f"damping {float(drawn['damping']):g}", loc="left")
    return figure, drawn


def efficiency_over_training(run: xr.DataTree, candidates: Sequence[str] | None = None) -> Drawing:
    """Returns held-out efficiency over training, drawn, and own and held-out efficiencies (step, candidate).

    Args:
        run: an opened run.
        candidates: which; default the seven that are best at the last measured step, and the run's update.
    """
    over = efficiency(_rows(run))
    _require(over["held_out"], "an efficiency")
    if candidates is None:
        last = np.nan_to_num(over["held_out"].isel(step=-1).values, nan=-1.0)
        best = over["candidate"].values[np.argsort(-last, kind="stable")][:7]
        candidates = [*best, *({"update"} & set(over["candidate"].values) - set(best))]
    drawn = over.sel(candidate=list(candidates))
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.85)
        for i, name in enumerate(drawn["candidate"].values):
            each = drawn.sel(candidate=name)
            axes.errorbar(
                each["step"], 100 * each["held_out"], 100 * each["held_out_stderr"], color=COLORS[i % len(COLORS)],
                linestyle=DASHES[min(i // len(COLORS), 2)], marker=marker(each.sizes["step"]), label=plain(str(name)),
                elinewidth=0.6,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out efficiency (%)")
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0)
    return figure, drawn


def block_efficiency(run: xr.DataTree) -> Drawing:
    """Returns each candidate's efficiency within each block at the last measured step, drawn, and what it leaves."""
    losses = block_losses(_rows(run).isel(step=[-1])).isel(step=0)
    _require(losses["efficiency"], "a block_efficiency")
    with matplotlib.rc_context(STYLE):
        values = 100 * losses["efficiency"].values
        blocks = [short(str(name)) for name in losses["block"].values]
        figure = _grid(values, losses["candidate"].values, blocks, "efficiency (%)", "cividis", 0.0, 100.0)
        figure.axes[0].set_title(f"step {int(losses['step']):,}", loc="left")
    return figure, losses


def block_step_gains(run: xr.DataTree) -> Drawing:
    """Returns what a step size per block would multiply each held-out decrease by, drawn, and `block_steps`."""
    steps = block_steps(_rows(run).isel(step=-1))
    _require(steps["gain"], "block_curvature_held_out")
    with matplotlib.rc_context(STYLE):
        figure, axes = new(0.6 + 0.17 * steps.sizes["candidate"])
        places = np.arange(steps.sizes["candidate"])
        looks = (
            ("other sequences", "together", "together", ACCENT, ACCENT),
            ("other sequences", "alone", "each layer alone", ACCENT, "white"),
            ("own batch", "together", "found on own batch", SECOND, "white"),
        )
        for found, known, label, color, face in looks:
            gain, error = (
                steps[name].sel(found=found, known=known).values for name in ("gain", "gain_stderr")
            )
            axes.errorbar(gain, places, xerr=error, fmt="o", color=color, mfc=face, label=label)
        axes.axvline(1, color="#999999", linewidth=0.6, zorder=0)
        _rows_named(axes, steps["candidate"].values)
        axes.set_xlabel("decrease / best single step's")
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.3)
    return figure, steps


def block_step_sizes(run: xr.DataTree) -> Drawing:
    """Returns each block's best step size in units of the best single one, drawn, and `block_steps`."""
    steps = block_steps(_rows(run).isel(step=-1))
    _require(steps["multiplier"], "block_curvature_held_out")
    with matplotlib.rc_context(STYLE):
        blocks = [short(str(name)) for name in steps["block"].values]
        figure = _ratio_grid(
            steps["multiplier"].values, steps["candidate"].values, blocks, "step / single step"
        )
        row, column = np.nonzero(steps["resolved"].values)
        figure.axes[0].plot(column, row, ".", color="black", markersize=2.5)
    return figure, steps


def _rows(run: xr.DataTree) -> xr.Dataset:
    rows = preconditioner_rows(stored(run, "preconditioner"))
    if rows is None:
        raise UserError("no row of the table 'preconditioner' holds a number; nothing to draw")
    return rows


def _require(values: xr.DataArray, what: str) -> None:
    if not np.isfinite(values.values).any():
        raise UserError(f"no row of the table 'preconditioner' holds {what}; nothing to draw")


def _rows_named(axes: Axes, names: np.ndarray) -> None:
    axes.set_yticks(np.arange(len(names)), [short(str(name)) for name in names])
    axes.invert_yaxis()


def _ratio_grid(values: np.ndarray, rows: np.ndarray, columns: Sequence[str], label: str) -> Figure:
    """Returns ratios about 1 as a grid in powers of two; below zero takes the low end's colour."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(values > 0, np.log2(values), np.where(np.isfinite(values), -2.0, np.nan))
    figure = _grid(z, rows, columns, label, "PuOr", -2.0, 2.0)
    bar = figure.axes[1]
    bar.set_yticks(range(-2, 3), ["¼", "½", "1", "2", "4"])
    return figure


def _grid(
    values: np.ndarray,
    rows: np.ndarray,
    columns: Sequence[str],
    label: str,
    cmap: str,
    low: float,
    high: float,
) -> Figure:
    figure, axes = new(0.9 + 0.16 * max(len(rows), 5))
    image = axes.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=low, vmax=high, aspect="auto")
    ticks = range(0, len(columns), max(1, len(columns) // 30))
    crowded = len(columns) > 6 or max(map(len, columns)) > 6
    axes.set_xticks(ticks, [columns[i] for i in ticks], rotation=90 if crowded else 0)
    axes.set_yticks(range(len(rows)), [short(str(name)) for name in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label, pad=0.03).outline.set_visible(False)  # pyright: ignore
    return figure
