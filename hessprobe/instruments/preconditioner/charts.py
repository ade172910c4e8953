"""The charts of the section on preconditioners: when pairs of layers pay, the scoreboard, and what each layer loses."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sequential

from hessprobe.pictures.charts import ACCENT, SECOND, Series, evenly_spaced, layout, over_steps
from hessprobe.pictures.named_charts import (
    add_dots,
    dotted,
    errors_said,
    grid,
    labelled,
    mark,
    numbers_said,
    on_ratio_axis,
    ratio_grid,
)

COLORS = tuple(f"var(--series-{i})" for i in range(1, 8))
COLUMNS_DRAWN = 60


def pays_chart(pays: xr.Dataset) -> go.Figure:
    """Returns layerwise over full Gauss-Newton against the curvature batch, a colour for each damping."""
    figure = go.Figure(layout=layout("curvature sequences", "layerwise over full", showlegend=True))
    sizes = pays["curvature_sequences"].values
    for i, damping in enumerate(pays["damping"].values):
        each, color = pays.isel(damping=i), COLORS[i % len(COLORS)]
        for name, dash, words in (("", "solid", "held out"), ("own_", "dot", "own batch")):
            values, errors = each[f"{name}ratio"].values, each[f"{name}stderr"].values
            said = np.where(np.isfinite(errors), [f" ± {error:.2g}" for error in errors], "")
            figure.add_scatter(
                x=sizes,
                y=values,
                customdata=said,
                name=f"μ {damping:g}, {words}",
                mode="lines+markers",
                line={"color": color, "width": 1.8 if not name else 1.2, "dash": dash},
                marker={"size": 6 if not name else 4, "color": color},
                error_y={"type": "data", "array": errors, "thickness": 1.2, "width": 3},
                hovertemplate=f"μ {damping:g}, {words}<br>%{{x}} sequences: %{{y:.3g}}%{{customdata}}<extra></extra>",
            )
        if "size" in str(each["verdict"].values) and np.isfinite(float(each["crossover"])):
            at, low, high = (float(each[n]) for n in ("crossover", "crossover_low", "crossover_high"))
            figure.add_scatter(
                x=[at],
                y=[1.0],
                mode="markers",
                showlegend=False,
                marker={"symbol": "diamond-open", "size": 11, "color": color, "line": {"width": 2}},
                hovertemplate=f"μ {damping:g}: crosses at {at:.3g} ({low:.3g} to {high:.3g}) sequences<extra></extra>",
            )
    on_ratio_axis(figure, "y")
    figure.update_xaxes(
        type="log", tickvals=sizes.tolist(), ticktext=[f"{size:,}" for size in sizes], showgrid=False
    )
    return figure


def pays_over_training(ratios: xr.Dataset) -> go.Figure:
    """Returns layerwise over full with the largest curvature batch over training (step, damping), a line a damping."""
    lines = [
        Series(
            label=f"μ {damping:g}",
            steps=ratios["step"].values,
            values=ratios["per_step"].values[:, i],
            stderr=ratios["per_step_stderr"].values[:, i],
            color=COLORS[i % len(COLORS)],
        )
        for i, damping in enumerate(ratios["damping"].values)
        if np.isfinite(ratios["per_step"].values[:, i]).any()
    ]
    figure = over_steps(lines, "layerwise over full", ".3g").update_layout(showlegend=True)
    return on_ratio_axis(figure, "y")


def scoreboard_chart(board: xr.Dataset) -> go.Figure:
    """Returns every candidate's efficiency at one row, on its own batch and held out, in the order given."""
    names = board["candidate"].values
    figure = go.Figure(layout=layout("efficiency", "", showlegend=True, margin={"l": 20}))
    looks = (
        ("own", "own batch", SECOND, "circle-open", 7),
        ("held_out", "held out", ACCENT, "circle", 8),
    )
    for name, words, color, symbol, size in looks:
        values, errors = board[name].values, board[f"{name}_stderr"].values
        add_dots(figure, values, errors, names, words, color, symbol, size, percent=True)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", showgrid=True)
    return dotted(figure, names)


def efficiency_over_training(over: xr.Dataset, which: str, end: float) -> go.Figure:
    """Returns `own` or `held_out` efficiency of every candidate over training as a grid, on a scale from 0 to `end`."""
    over = over.isel(step=evenly_spaced(over.sizes["step"], COLUMNS_DRAWN))
    steps = [f"{step:,}" for step in over["step"].values.tolist()]
    return grid(
        steps,
        over["candidate"].values,
        over[which].values.T,
        errors_said(over[f"{which}_stderr"].values.T, scale=100, unit=" %"),
        hover="%{y} at step %{x}<br>%{z:.1%}%{customdata}",
        x="step",
        zmin=0.0,
        zmax=end,
        colorscale=sequential.Cividis,
        ticks={"tickformat": ".0%", "nticks": 5},
    )


def over_layerwise_chart(ratios: xr.Dataset) -> go.Figure:
    """Returns each candidate's held-out decrease over the layerwise oracle's, by curvature batch and damping, as a grid.

    A dot marks what lies beyond two errors from 1.
    """
    flat = ratios[["ratio", "stderr"]].transpose("candidate", "damping", "curvature_sequences")
    labels = [
        f"{size} · μ {mu:g}" for mu in flat["damping"].values for size in flat["curvature_sequences"].values
    ]
    values, errors = (flat[name].values.reshape(flat.sizes["candidate"], -1) for name in ("ratio", "stderr"))
    said = numbers_said(values, errors)
    far = np.abs(np.log2(np.where(values > 0, values, 1.0))).max()
    end = int(np.clip(np.ceil(far), 1, 5))
    names, hover = flat["candidate"].values, "%{y}, %{x}<br>%{customdata} of layerwise"
    figure = ratio_grid(labels, names, values, said, hover, end)
    with np.errstate(invalid="ignore"):
        mark(figure, np.abs(values - 1) > 2 * errors)
    figure.update_xaxes(title={"text": "curvature sequences · damping"})
    return figure


def block_efficiency_chart(losses: xr.Dataset) -> go.Figure:
    """Returns each candidate's efficiency within each block (candidate, block) as a grid; hover says what it leaves."""
    lost = np.where(
        np.isfinite(losses["lost"].values),
        [[f"{100 * x:.1f} %" for x in row] for row in losses["lost"].values],
        "–",
    )
    return grid(
        labelled(losses["block"].values),
        losses["candidate"].values,
        losses["efficiency"].values,
        lost,
        hover="%{y} in %{x}<br>%{z:.1%} efficient; leaves %{customdata} of all layers' gain",
        x="",
        zmin=0.0,
        zmax=1.0,
        colorscale=sequential.Cividis,
        ticks={"tickformat": ".0%", "nticks": 5},
    )


def block_steps_chart(steps: xr.Dataset) -> go.Figure:
    """Returns what a step size per block would multiply each candidate's held-out decrease by."""
    names = steps["candidate"].values
    figure = go.Figure(layout=layout("times the best single step", "", showlegend=True, margin={"l": 20}))
    looks = (
        ("other sequences", "together", "found on other held-out sequences", ACCENT, "circle", 8),
        ("other sequences", "alone", "each layer alone", ACCENT, "circle-open", 7),
        ("own batch", "together", "found on the own batch", SECOND, "diamond-open", 7),
    )
    for found, known, words, color, symbol, size in looks:
        at = {"found": found, "known": known}
        values, errors = (steps[name].sel(at).values for name in ("gain", "gain_stderr"))
        add_dots(figure, values, errors, names, words, color, symbol, size, percent=False)
    return dotted(on_ratio_axis(figure, "x"), names)


def block_rates_chart(steps: xr.Dataset) -> go.Figure:
    """Returns each block's best step size in units of the best single one, as a grid; a dot where resolved from 1."""
    values, errors = steps["multiplier"].values, steps["multiplier_stderr"].values
    own = steps["own_multiplier"].values
    said = numbers_said(values, errors)
    said = [
        [f"{text} times<br>{own[i, j]:.3g} on the own batch" if text else "" for j, text in enumerate(row)]
        for i, row in enumerate(said)
    ]
    figure = ratio_grid(
        labelled(steps["block"].values),
        steps["candidate"].values,
        values,
        said,
        "%{y} in %{x}<br>%{customdata}",
    )
    mark(figure, steps["resolved"].values)
    return figure
