"""Lines of several runs in one chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go

from hessprobe.pictures.charts import Series, layout, shown
from hessprobe.reading.rows import sound_rows
from hessprobe.report.beside import Beside

COLORS = tuple(f"var(--series-{i})" for i in range(1, 8))


DASHES = ("solid", "dot", "dash")


# What a run has to draw: places, values, errors; None where it has nothing.
Line = tuple[np.ndarray, np.ndarray, np.ndarray | None]


Ask = Callable[[Beside], Line | None]


def lines_over_steps(beside: Sequence[Beside], ask: Ask) -> list[Series]:
    """Returns one line for each run that has something to show."""
    lines = []
    for run, look in looks(beside):
        found = ask(run)
        if found is not None and found[1].size:
            steps, values, stderr = found
            lines.append(
                Series(
                    label=run.label,
                    steps=steps,
                    values=values,
                    stderr=stderr,
                    color=look["color"],
                    dash=look["dash"],
                )
            )
    return lines


def stored_line(table: str, variable: str) -> Ask:
    """Returns the function that takes a variable of a table as it is stored, without an error."""

    def ask(run: Beside) -> Line | None:
        if table not in run.tree.children:
            return None
        rows = sound_rows(run.tree[table].to_dataset(), variable)
        if variable not in rows:
            return None
        return rows["step"].values, rows[variable].values.astype(float), None

    return ask


def lines_with_errors(beside: Sequence[Beside], ask: Ask, x: str, y: str) -> go.Figure | None:
    """Returns lines with error bars against something else than steps."""
    figure = go.Figure(layout=layout(x, y, showlegend=True))
    for run, look in looks(beside):
        found = ask(run)
        if found is None:
            continue
        places, values, errors = found
        figure.add_scatter(
            x=places,
            y=values,
            name=shown(run.label),
            mode="lines+markers",
            line={"width": 1.8, **look},
            marker={"color": look["color"], "size": 6},
            error_y={"type": "data", "array": errors, "thickness": 1.2, "width": 3},
            customdata=errors,
            hovertemplate=f"{shown(run.label)}<br>{x} %{{x}}: %{{y:.4g}} ± %{{customdata:.2g}}<extra></extra>",
        )
    return figure if figure.data else None


def looks(beside: Sequence[Beside]) -> list[tuple[Beside, dict[str, str]]]:
    """Returns each run with its colour and, beyond seven runs, its dash."""
    dashes = [DASHES[min(i // len(COLORS), len(DASHES) - 1)] for i in range(len(beside))]
    return [
        (run, {"color": color, "dash": dash})
        for run, color, dash in zip(beside, cycle(COLORS), dashes, strict=False)
    ]
