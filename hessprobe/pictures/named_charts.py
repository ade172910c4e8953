"""Charts whose rows are names: dots with errors, grids of numbers, and ratios about 1 on a scale of powers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hessprobe.pictures.charts import DIVERGING, layout, shown

# Ends of the diverging scale of ratios, as a power of two.
RATIO_END = 2


def labelled(names: Sequence[str] | np.ndarray) -> list[str]:
    return [shown(name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}") for name in map(str, names)]


def errors_said(errors: np.ndarray, scale: float = 1.0, unit: str = "") -> list[list[str]]:
    return [
        [f" ± {scale * error:.2g}{unit}" if np.isfinite(error) else "" for error in row] for row in errors
    ]


def numbers_said(values: np.ndarray, errors: np.ndarray) -> list[list[str]]:
    """Returns each cell's number with its error, empty for NaN: colours of ratios are clipped."""
    tails = errors_said(errors)
    return [
        [f"{value:.3g}{tail}" if np.isfinite(value) else "" for value, tail in zip(row, said, strict=True)]
        for row, said in zip(values, tails, strict=True)
    ]


def add_dots(
    figure: go.Figure,
    values: np.ndarray,
    errors: np.ndarray,
    rows: Sequence[str] | np.ndarray,
    name: str,
    color: str,
    symbol: str,
    size: int,
    *,
    percent: bool,
) -> None:
    """Adds a dot with its error to each row of a chart of dots."""
    at = np.flatnonzero(np.isfinite(values))
    if at.size == 0:
        return
    said = errors_said(errors[None, at], 100, " %")[0] if percent else errors_said(errors[None, at])[0]
    labels, number = labelled(rows), "%{x:.1%}" if percent else "%{x:.3g}"
    figure.add_scatter(
        x=values[at],
        y=[labels[i] for i in at],
        mode="markers",
        name=shown(name),
        marker={"color": color, "size": size, "symbol": symbol, "line": {"width": 1.5, "color": color}},
        error_x={"type": "data", "array": errors[at], "thickness": 1.2, "width": 3, "color": color},
        customdata=said,
        hovertemplate=f"%{{y}}, {shown(name)}<br>{number}%{{customdata}}<extra></extra>",
    )


def dotted(figure: go.Figure, rows: Sequence[str] | np.ndarray) -> go.Figure:
    """Returns a chart of dots with its rows, in their order from the top."""
    labels = labelled(rows)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=labels[::-1], showgrid=True, title=None,
        range=[-0.7, len(labels) - 0.3],
    )  # fmt: skip
    return figure


def grid(
    columns: Sequence[str],
    rows: np.ndarray,
    z: np.ndarray,
    customdata: Any,
    *,
    hover: str,
    x: str,
    zmin: float,
    zmax: float,
    colorscale: Any,
    ticks: dict[str, Any],
) -> go.Figure:
    figure = go.Figure(layout=layout(x, "", margin={"l": 20, "t": 40}))
    bar: dict[str, Any] = {
        "orientation": "h", "x": 0.5, "y": 1.0, "yanchor": "bottom", "thickness": 8, "len": 1.0, "ypad": 4,
        "outlinewidth": 0,
    }  # fmt: skip
    figure.add_heatmap(
        x=list(columns), y=labelled(rows), z=z, customdata=customdata, zmin=zmin, zmax=zmax, colorscale=colorscale,
        xgap=1, ygap=1, hoverongaps=False, hovertemplate=f"{hover}<extra></extra>", colorbar=bar | ticks,
    )  # fmt: skip
    figure.update_xaxes(type="category", autotickangles=[0, -45, -90])
    figure.update_yaxes(type="category", autorange="reversed", title=None, showgrid=False)
    return figure


def ratio_grid(
    columns: Sequence[str],
    rows: np.ndarray,
    values: np.ndarray,
    said: Any,
    hover: str,
    end: int = RATIO_END,
) -> go.Figure:
    """Returns a grid of ratios about 1 on a diverging scale to 2^end; below zero takes the low end's colour."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(values > 0, np.log2(values), np.where(np.isfinite(values), -float(end), np.nan))
    ends = list(range(-end, end + 1))
    return grid(
        columns, rows, np.clip(z, -end, end), said, hover=hover, x="", zmin=-end, zmax=end, colorscale=DIVERGING,
        ticks={"tickvals": ends, "ticktext": [_fraction(power) for power in ends]},
    )  # fmt: skip


def _fraction(power: int) -> str:
    return f"{2**power:g}" if power >= 0 else f"1/{2**-power}"


def mark(figure: go.Figure, resolved: np.ndarray) -> None:
    """Adds a dot to the cells of a grid that are resolved."""
    cells: Any = figure.data[0]
    row, column = np.nonzero(resolved)
    figure.add_scatter(
        x=[cells.x[j] for j in column], y=[cells.y[i] for i in row], mode="markers",
        marker={"color": "var(--ink)", "size": 4}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def on_ratio_axis(figure: go.Figure, which: str) -> go.Figure:
    """Returns a figure with one axis logarithmic about a line at 1, with plain numbers as fine as its range asks for."""
    data: list[Any] = list(figure.data)
    values = np.concatenate(
        [np.ravel(np.asarray(trace[which], dtype=float)) for trace in data] or [np.ones(1)]
    )
    values = values[np.isfinite(values) & (values > 0)]
    decades = float(np.log10(values.max() / values.min())) if values.size else 0.0
    digits = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    digits = (
        digits
        if decades < 0.35
        else (1, 1.5, 2, 3, 4, 5, 7)
        if decades < 0.9
        else (1, 2, 5)
        if decades < 2.5
        else (1,)
    )
    ticks = [digit * 10.0**power for power in range(-6, 7) for digit in digits]
    options = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    line = {"line": {"color": "var(--faint)", "width": 1, "dash": "dot"}, "layer": "below"}
    if which == "y":
        figure.update_yaxes(**options)
        figure.add_hline(y=1.0, **line)
    else:
        figure.update_xaxes(**options, showgrid=True)
        figure.add_vline(x=1.0, **line)
    return figure
