"""What a plotly and a matplotlib figure draw, read back in one form."""

from __future__ import annotations

from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure


def lines_on_page(figure: go.Figure) -> list[dict[str, Any]]:
    """Returns {label, x, y, stderr} of every line that has a name, in the order drawn."""
    traces: Any = figure.data
    return [
        {
            "label": unescape(trace.name).replace("<br>", "\n"),
            "x": np.asarray(trace.x, dtype=float),
            "y": np.asarray(trace.y, dtype=float),
            "stderr": None if trace.error_y.array is None else np.asarray(trace.error_y.array, dtype=float),
        }
        for trace in traces
        if trace.name is not None
    ]


def lines_on_paper(figure: Figure, panel: int = 0) -> list[dict[str, Any]]:
    """Returns {x, y, stderr} of every line with or without errors, in the order drawn."""
    containers: Any = figure.axes[panel].containers
    return [
        {
            "x": np.asarray(container.lines[0].get_xdata(), dtype=float),
            "y": np.asarray(container.lines[0].get_ydata(), dtype=float),
            "stderr": None if not container.has_yerr else half_lengths(container.lines[2][0], 1),
        }
        for container in containers
    ]


def half_lengths(bars: Any, which: int) -> np.ndarray:
    """Returns half of each error bar's length, NaN where there is none."""
    return np.array([np.ptp(ends[:, which]) / 2 if len(ends) else np.nan for ends in bars.get_segments()])


def grid_on_page(figure: go.Figure) -> np.ndarray:
    trace: Any = figure.data[0]
    return np.asarray(trace.z, dtype=float)


def grid_on_paper(figure: Figure) -> np.ndarray:
    image: Any = figure.axes[0].images[0].get_array()
    return np.ma.filled(np.ma.asarray(image), np.nan)
