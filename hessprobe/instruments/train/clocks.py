"""Loss against any of a run's clocks: one chart whose places and hover text the page's script exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

# Clock -> what the page calls it, its axis, and how the hover text says a place on it.
CLOCKS = {
    "step": ("steps", "step", ""),
    "tokens": ("tokens", "tokens read to take steps", ", %{x:,.0f} tokens"),
    "seconds": ("seconds", "seconds of training steps", ", %{x:,.1f} s"),
    "gradient_equivalents": ("gradients", "gradients of a minibatch", ", %{x:,.0f} gradients"),
}


def by_clock(figure: go.Figure, curves: Sequence[xr.Dataset]) -> dict[str, Any]:
    """Returns {clock: label, axis title, places and hover text of every line} for a chart over steps.

    The clocks are those that every curve has at every step drawn, the steps themselves first. The hover text takes the
    steps from the lines' customdata, which the page's script puts there.

    Args:
        figure: the chart, its lines' places steps.
        curves: rows of the table `train`, one set for each line, holding every step it has.
    """
    lines: Any = figure.data
    places = {clock: _places(lines, curves, clock) for clock in CLOCKS}
    said = [str(line.hovertemplate).replace("step %{x}", "step %{customdata}") for line in lines]
    return {
        clock: {"label": label, "title": title, "x": x, "hover": [_inserted(hover, words) for hover in said]}
        for clock, (label, title, words) in CLOCKS.items()
        if (x := places[clock]) is not None
    }


def _places(lines: Any, curves: Sequence[xr.Dataset], clock: str) -> list[list[float]] | None:
    found: list[list[float]] = []
    for line, curve in zip(lines, curves, strict=True):
        if clock not in curve.variables:
            return None
        values = curve[clock].sel(step=np.asarray(line.x)).values
        if not np.isfinite(values).all():
            return None
        # What counts whole things needs no ".0" ten thousand times over.
        found.append((values.astype(int) if (values == np.round(values)).all() else values).tolist())
    return found


def _inserted(hover: str, words: str) -> str:
    return hover.replace("%{customdata}", "%{customdata}" + words, 1)
