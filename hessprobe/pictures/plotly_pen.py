"""The pen of the page: a picture as a plotly figure.

Colours are the page's own CSS variables, so a chart follows the light or dark scheme; the page's script puts their values
in when it draws. Names go through plotly's small HTML, so every name is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sequential

from hessprobe.pictures.hover import said, shown
from hessprobe.pictures.looks import Look, on_page
from hessprobe.pictures.picture import (
    Axis,
    Dots,
    Heatmap,
    Line,
    Lines,
    Panels,
    Picture,
    Points,
    are_steps,
    drawable,
    floor_of,
    is_empty,
    powers_of_two,
    scale_end,
    whole_range,
)
from hessprobe.pictures.room import (
    COLUMNS_DRAWN,
    NAMES_SHOWN,
    POINTS_DRAWN,
    SINGLE_POINTS,
    drawn_points,
    evenly_spaced,
    fraction,
    ratio_ticks,
    short,
)

DIVERGING = [[0.0, "var(--negative)"], [0.5, "var(--card)"], [1.0, "var(--positive)"]]
ERROR_BAR = {"type": "data", "thickness": 1.2, "width": 3}
EDGE: dict[str, Any] = {"mode": "lines", "hoverinfo": "skip", "showlegend": False}
COLOR_BAR = {
    "orientation": "h", "x": 0.5, "y": 1.0, "yanchor": "bottom", "thickness": 8, "len": 1.0, "ypad": 4,
    "outlinewidth": 0,
}  # fmt: skip


def charts(pictures: Iterable[Picture]) -> dict[str, go.Figure]:
    """Returns {chart id: figure} of the pictures that are for the page and hold a number; of panels, one chart each."""
    figures: dict[str, go.Figure] = {}
    for picture in pictures:
        if picture.where == "paper" or is_empty(picture):
            continue
        if isinstance(picture, Panels):
            figures |= charts(picture.panels)
        else:
            figures[picture.name] = draw(picture)
    return figures


def draw(picture: Picture) -> go.Figure:
    """Returns one picture as a plotly figure; UserError with its reason where it holds no number."""
    drawable(picture)
    match picture:
        case Lines():
            return _lines(picture)
        case Heatmap():
            return _heatmap(picture)
        case Dots():
            return _dots(picture)
    raise TypeError(f"no kind of picture that is one chart: {type(picture).__name__}")


def layout(x: str, y: str, **changes: Any) -> go.Layout:
    """Returns the one layout all charts share, with axis titles `x` and `y`."""
    axis = {
        "gridcolor": "var(--rule)",
        "zerolinecolor": "var(--faint)",
        "linecolor": "var(--rule)",
        "ticks": "",
    }
    shared = go.Layout(
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
    return shared.update(changes)


def _lines(picture: Lines) -> go.Figure:
    lines = [line for line in picture.lines if np.isfinite(line.y).any()]
    legend = len(lines) > 1 if picture.legend is None else picture.legend
    figure = go.Figure(layout=layout(_title(picture.x), _title(picture.y), showlegend=legend))
    floor, in_legend = floor_of(picture), set()
    for line in lines:
        name = line.group or line.label
        _add_line(figure, picture, line, floor, legend=bool(line.label) and name not in in_legend)
        in_legend.add(name)
    figure.update_xaxes(_axis(picture.x, [line.x for line in lines]))
    figure.update_yaxes(_axis(picture.y, [line.y for line in lines]))
    if picture.y.decades:
        figure.update_xaxes(zeroline=True)
    _lines_across(figure, picture.x, picture.y)
    return figure


def _add_line(figure: go.Figure, picture: Lines, line: Line, floor: float, *, legend: bool) -> None:
    y = np.where(line.y > floor, line.y, np.nan)
    keep = evenly_spaced(y.size, POINTS_DRAWN // 4) if line.dots else drawn_points(y)
    x, y, few = line.x[keep], y[keep], keep.size <= SINGLE_POINTS
    stderr = None if line.stderr is None else line.stderr[keep]
    notes = None if line.notes is None else [line.notes[i] for i in keep]
    color, name = on_page(line.look.color), line.group or line.label
    if stderr is not None and not few and not line.dots:
        figure.add_scatter(**EDGE, x=x, y=y - stderr, line={"width": 0})
        figure.add_scatter(
            **EDGE, x=x, y=y + stderr, line={"width": 0}, fill="tonexty", fillcolor="var(--band)"
        )
    hover = line.hover or picture.hover or f"{shown(picture.x.words)} {{x}}: {{y}}"
    hover = hover.replace("{x}", f"%{{x:{picture.x.number}}}" if picture.x.number else "%{x}")
    hover, customdata = said(hover, "{y}", picture.y, y, stderr, notes)
    if line.low is not None and line.high is not None:
        ends = [np.where(end > floor, end, np.nan)[keep] for end in (line.low, line.high)]
        for end in ends:
            thin = {"color": color, "width": 0.5}
            figure.add_scatter(**EDGE, x=x, y=end, line=thin, opacity=0.6, legendgroup=shown(name))
        customdata = np.stack(ends, 1)
        hover = hover.replace("{range}", "%{customdata[0]:.1e} to %{customdata[1]:.1e}")
    silent = {} if line.label else {"hoverinfo": "skip"}
    bars = ERROR_BAR | {"array": stderr} if stderr is not None and few else None
    marker = _marker(line.look, (4 if line.look.thin else 6) if few else 3)
    figure.add_scatter(
        x=x,
        y=y,
        customdata=customdata,
        name=shown(name),
        legendgroup=shown(name),
        showlegend=legend,
        mode="markers" if line.dots else "lines+markers" if line.markers and few else "lines",
        line={"color": color, "width": 1.2 if line.look.thin else 1.8, "dash": line.look.dash},
        marker=marker | {"opacity": 1.0 if few else 0.5},
        error_y=bars,
        fill="tonexty" if line.fill else None,
        fillcolor="var(--band)" if line.fill else None,
        hovertemplate=f"{shown(line.label)}<br>{hover}<extra></extra>" if line.label else None,
        **silent,
    )


def _heatmap(picture: Heatmap) -> go.Figure:
    values, stderr = picture.values, picture.stderr
    marked, notes, names = picture.marked, picture.notes, list(picture.columns)
    if are_steps(picture.columns):
        keep = evenly_spaced(len(names), COLUMNS_DRAWN) if names else np.empty(0, int)
        names, values = [f"{names[i]:,}" for i in keep], values[:, keep]
        stderr, marked = (None if each is None else each[:, keep] for each in (stderr, marked))
        notes = None if notes is None else [[row[i] for i in keep] for row in notes]
    columns, rows = [shown(name) for name in names], [shown(name) for name in picture.rows]
    z, low, high, ticks = _colors(picture, values)
    hover = picture.hover.replace("{row}", "%{y}").replace("{column}", "%{x}")
    # Colours of ratios are clipped and of logarithms.
    exact = picture.value.scale == "ratio"
    hover, customdata = said(hover, "{value}", picture.value, values, stderr, notes, exact=exact)
    margin = {"l": 20, "r": 10, "t": 30, "b": 20} if picture.square else {"l": 20, "t": 40}
    figure = go.Figure(layout=layout(_title(picture.x), "", margin=margin))
    figure.add_heatmap(
        x=columns,
        y=rows,
        z=z,
        customdata=customdata,
        zmin=low,
        zmax=high,
        colorscale=DIVERGING if picture.signed or picture.value.scale == "ratio" else sequential.Cividis,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=f"{hover}<extra></extra>",
        colorbar=COLOR_BAR | ticks,
    )
    if marked is not None:
        row, column = np.nonzero(marked)
        figure.add_scatter(
            x=[columns[j] for j in column], y=[rows[i] for i in row], mode="markers",
            marker={"color": "var(--ink)", "size": 4}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    angles = [0, -90] if picture.square else [0, -45, -90]
    figure.update_xaxes(
        type="category", autotickangles=angles, **_names(names, columns, force=picture.square)
    )
    # A row's name stands where it has room: plotly chooses which of very many.
    figure.update_yaxes(
        type="category",
        autorange="reversed",
        title=None,
        showgrid=False,
        **_names(picture.rows, rows, force=True),
    )
    return figure


def _colors(picture: Heatmap, values: np.ndarray) -> tuple[np.ndarray, float, float, dict[str, Any]]:
    """Returns the numbers whose colours are drawn, the scale's ends, and its ticks."""
    end = scale_end(picture)
    if picture.value.scale == "ratio":
        powers = list(range(-int(end), int(end) + 1))
        ticks = {"tickvals": powers, "ticktext": [fraction(power) for power in powers]}
        return powers_of_two(values, end), -end, end, ticks
    ticks = {"tickformat": ".1~%" if picture.value.percent else ".2~g", "nticks": 5}
    return values, -end if picture.signed else 0.0, end, ticks


def _dots(picture: Dots) -> go.Figure:
    figure = go.Figure(layout=layout(_title(picture.x), "", showlegend=picture.legend, margin={"l": 20}))
    rows = [shown(name) for name in picture.rows]
    for points in picture.points:
        at = np.flatnonzero(np.isfinite(points.values))
        if at.size:
            _add_points(figure, picture, points, at, rows)
    numbers = [points.values for points in picture.points]
    figure.update_xaxes({**_axis(picture.x, numbers), "showgrid": True})
    if picture.bars:
        reach = whole_range(picture.x, [*numbers, *(p.high for p in picture.points if p.high is not None)])
        figure.update_xaxes(range=[0, 1.4 * max(1.0, reach.max(initial=0.0))])  # room for the words
    elif not picture.x.percent and picture.x.scale != "ratio":
        figure.update_xaxes(zeroline=True)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=rows[::-1], showgrid=not picture.bars, title=None,
        range=[-0.7, len(rows) - 0.3], **({} if picture.bars else _names(picture.rows, rows, force=True)),
    )  # fmt: skip
    _lines_across(figure, picture.x, Axis())
    return figure


def _add_points(figure: go.Figure, picture: Dots, points: Points, at: np.ndarray, rows: list[str]) -> None:
    values, names, color = points.values[at], [rows[i] for i in at], on_page(points.look.color)
    stderr = None if points.stderr is None else points.stderr[at]
    notes = None if points.notes is None else [points.notes[i] for i in at]
    hover = picture.hover.replace("{row}", "%{y}").replace("{label}", shown(points.label))
    hover, customdata = said(hover, "{x}", picture.x, values, stderr, notes)
    errors = None if stderr is None else ERROR_BAR | {"array": stderr, "color": color}
    if points.low is not None and points.high is not None:
        ranges = {"array": points.high[at] - values, "arrayminus": values - points.low[at]}
        errors = ERROR_BAR | {"color": "var(--ink)"} | ranges
    shared = {
        "x": values, "y": names, "name": shown(points.label), "customdata": customdata, "error_x": errors,
        "hovertemplate": f"{hover}<extra></extra>",
    }  # fmt: skip
    if not picture.bars:
        figure.add_scatter(
            **shared, mode="markers", marker=_marker(points.look, 7 if points.look.hollow else 8)
        )
        return
    figure.add_bar(**shared, orientation="h", marker={"color": color})
    if notes is not None:
        ends = values if points.high is None else np.fmax(values, points.high[at])
        figure.add_scatter(
            x=ends, y=names, text=[f"  {shown(note)}" for note in notes], mode="text",
            textposition="middle right", hoverinfo="skip", showlegend=False,
        )  # fmt: skip


def _marker(look: Look, size: int) -> dict[str, Any]:
    symbol, color = look.marker + ("-open" if look.hollow else ""), on_page(look.color)
    return {"color": color, "size": size, "symbol": symbol} | (
        {"line": {"width": 1.5, "color": color}} if look.hollow else {}
    )


def _title(axis: Axis) -> str:
    return shown(f"{axis.words}, {axis.units}" if axis.units else axis.words)


def _axis(axis: Axis, values: Sequence[Any]) -> dict[str, Any]:
    """Returns an axis's options for plotly, with ticks that suit the numbers along it."""
    found = whole_range(axis, values)
    largest = float(np.abs(found).max(initial=0.0))
    options: dict[str, Any] = {"type": "linear" if axis.scale == "linear" else "log"}
    ticks = list(axis.ticks) or (ratio_ticks(found) if axis.scale == "ratio" else [])
    if ticks:
        options |= {"tickvals": ticks, "ticktext": [f"{tick:,.10g}" for tick in ticks]}
    elif axis.decades:
        options |= {"exponentformat": "power", "dtick": 2}
    elif axis.percent:
        options["tickformat"] = ".10~%"
    elif axis.whole:
        options |= {"dtick": 1} if found.size and np.ptp(found) <= 20 else {}
    elif 0 < largest < 0.01:
        options["exponentformat"] = "e"  # not 50μ
    if axis.from_zero:
        options["rangemode"] = "tozero"
    if axis.reverse:
        options["autorange"] = "reversed"
    return options


def _lines_across(figure: go.Figure, x: Axis, y: Axis) -> None:
    ways: Any = (x, figure.add_vline), (y, figure.add_hline)
    for axis, add in ways:
        at = 1.0 if axis.scale == "ratio" else axis.at
        if at is None:
            continue
        words = {"text": shown(axis.at_words), "font": {"color": "var(--muted)"}}
        more: dict[str, Any] = (
            {"annotation": words, "annotation_position": "top right"} if axis.at_words else {}
        )
        if axis.scale == "ratio":
            more["layer"] = "below"
        color = "var(--muted)" if axis.at_words else "var(--faint)"
        line = {"color": color, "width": 1, "dash": "dot"}
        add(at, line=line, **more)


def _names(names: Sequence[Any], labels: list[str], *, force: bool) -> dict[str, Any]:
    """Returns ticks that show long names short; few names are all shown, of many plotly chooses which."""
    brief = [shown(short(str(name))) for name in names]
    if len(labels) > NAMES_SHOWN or not (force or brief != labels):
        return {}
    return {"tickvals": labels, "ticktext": brief}
