"""The page's charts as plotly figures: data in, figure out.

Colours are the page's own CSS variables, so a chart follows the light or dark scheme; the page's script
puts their values in when it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

ACCENT, SECOND, FAINT = "var(--accent)", "var(--second)", "var(--faint)"
DIVERGING = [[0.0, "var(--negative)"], [0.5, "var(--card)"], [1.0, "var(--positive)"]]
# An SVG path of 4,000 points draws at once; more would only overdraw the same pixels.
POINTS_DRAWN = 4000
ERROR_BARS_UP_TO = 60


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart over training steps; `stderr` draws error bars, or a band where rows are many.

    With `dots`, for values that jump between a few choices, points alone: of many, evenly spaced ones.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    stderr: np.ndarray | None = None
    color: str = ACCENT
    markers: bool = True
    dash: str = "solid"
    dots: bool = False


def shown(name: str) -> str:
    """Returns a name as plotly must be given it: its text goes through a small HTML of its own."""
    return escape(str(name), quote=False)


def drawn_points(values: np.ndarray, limit: int = POINTS_DRAWN) -> np.ndarray:
    """Returns the indices to draw of a long series: each bucket's lowest and highest, so no spike is lost."""
    if values.size <= limit:
        return np.arange(values.size)
    buckets = np.array_split(np.arange(values.size), limit // 2)
    with_gaps = np.where(np.isfinite(values), values, 0.0)
    ends = [(b[with_gaps[b].argmin()], b[with_gaps[b].argmax()]) for b in buckets]
    return np.unique([0, *np.ravel(ends), values.size - 1])


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Returns at most `limit` indices out of `count`, evenly spaced, the last always among them."""
    if limit < 2:
        return np.array([count - 1])
    return np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))


def layout(x: str, y: str, **changes) -> go.Layout:
    """Returns the one layout all charts share, with axis titles `x` and `y`."""
    axis = {
        "gridcolor": "var(--rule)",
        "zerolinecolor": "var(--faint)",
        "linecolor": "var(--rule)",
        "ticks": "",
    }
    base = go.Layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 52, "r": 10, "t": 26, "b": 40},
        xaxis=axis
        | {"title": {"text": x, "standoff": 6}, "automargin": True, "showgrid": False, "zeroline": False},
        yaxis=axis | {"title": {"text": y, "standoff": 8}, "automargin": True},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        hoverlabel={
            "bgcolor": "var(--card)",
            "bordercolor": "var(--faint)",
            "font": {"color": "var(--ink)", "family": "system-ui, sans-serif"},
        },
        hovermode="closest",
    )
    return base.update(changes)


def over_steps(series: Sequence[Series], y: str, y_format: str = ".4g", **changes) -> go.Figure:
    """Returns lines over training steps, each with its errors; hover says step, value and error.

    Args:
        series: the lines, each with its own steps.
        y: the vertical axis's title, with units.
        y_format: d3 format of the value in the hover text.
        changes: layout entries, as in `plotly.graph_objects.Layout`.
    """
    figure = go.Figure(layout=layout("step", y, showlegend=len(series) > 1, **changes))
    for line in series:
        keep = evenly_spaced(line.values.size, POINTS_DRAWN // 4) if line.dots else drawn_points(line.values)
        x, values = line.steps[keep], line.values[keep]
        errors = None if line.stderr is None else line.stderr[keep]
        few = x.size <= ERROR_BARS_UP_TO
        bars = errors is not None and few
        if errors is not None and not bars:
            edge = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
            figure.add_scatter(**edge, y=values - errors)
            figure.add_scatter(**edge, y=values + errors, fill="tonexty", fillcolor="var(--band)")
        said = f"%{{y:{y_format}}}" + ("" if errors is None else f" ± %{{customdata:{y_format}}}")
        figure.add_scatter(
            x=x,
            y=values,
            customdata=errors,
            name=shown(line.label),
            mode="markers" if line.dots else "lines+markers" if line.markers and few else "lines",
            line={"color": line.color, "width": 1.8, "dash": line.dash},
            marker={"size": 6 if few else 3, "color": line.color, "opacity": 1.0 if few else 0.5},
            error_y={"type": "data", "array": errors, "thickness": 1.2, "width": 3} if bars else None,
            hovertemplate=f"{shown(line.label)}<br>step %{{x}}: {said}<extra></extra>",
        )
    return figure
