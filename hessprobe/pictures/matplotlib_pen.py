"""The pen of papers: a picture as a matplotlib figure, one column wide, with text that stays text in PDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hessprobe.pictures.looks import DASHES, MARKERS, PALETTE
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
    powers_of_two,
    scale_end,
    whole_range,
)
from hessprobe.pictures.room import SINGLE_POINTS, fraction, ratio_ticks, short

COLUMN = 3.35  # inches: one column of a two-column page
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # embeds the font: text in the PDF can be searched and edited
    "savefig.dpi": 300,
}
ACROSS: dict[str, Any] = {"color": PALETTE["faint"], "linewidth": 0.6, "zorder": 0}


def draw(picture: Picture) -> Figure:
    """Returns a picture as a figure of one column's width; UserError with its reason where it holds no number."""
    drawable(picture)
    with matplotlib.rc_context(STYLE):
        match picture:
            case Panels():
                return _panels(picture)
            case Lines():
                figure, axes = _new(COLUMN * 0.62)
                _lines(axes, picture)
                _legend(figure, axes, picture.legend)
            case Heatmap():
                rows = max(len(picture.rows), 5)
                figure, axes = _new(COLUMN * 0.9 if picture.square else 0.9 + 0.16 * rows)
                _heatmap(figure, axes, picture)
            case Dots():
                row = 0.28 if picture.bars else 0.17
                figure, axes = _new(0.6 + row * max(len(picture.rows), 4))
                _dots(axes, picture)
                if picture.legend and axes.get_legend_handles_labels()[1]:
                    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.3)
            case _:
                raise TypeError(f"no kind of picture: {type(picture).__name__}")
        axes.set_title(plain(picture.at), loc="left")
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PDF and PNG into a folder, made where missing, and returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    with matplotlib.rc_context(STYLE):
        for path in paths:
            figure.savefig(path)
    return paths


def plain(name: object) -> str:
    """Returns a name without matplotlib's math: a dollar sign would start a formula."""
    return str(name).replace("$", r"\$")


def _new(height: float) -> tuple[Figure, Axes]:
    # Figure itself, not pyplot: pyplot keeps every figure alive in a global list.
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.add_subplot()


def _panels(picture: Panels) -> Figure:
    count = max(len(picture.panels), 1)
    figure = Figure(figsize=(COLUMN, COLUMN * 0.45 * count + 0.3), layout="constrained")
    all_axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, picture.panels, strict=False):
        _lines(axes, panel)
        axes.set_title(plain(panel.at), loc="left")
    for axes in all_axes[:-1]:
        axes.set_xlabel("")
    if picture.panels:
        _legend(figure, all_axes[0], picture.panels[0].legend)
    return figure


def _lines(axes: Axes, picture: Lines) -> None:
    floor, before = floor_of(picture), None
    names: set[str] = set()
    for line in picture.lines:
        if not np.isfinite(line.y).any():
            continue
        name = line.group or line.label
        _line(axes, line, before, floor, "" if name in names or not line.label else name)
        names.add(name)
        before = line
    _axis(axes, "x", picture.x, [line.x for line in picture.lines])
    _axis(axes, "y", picture.y, [line.y for line in picture.lines])
    if np.isfinite(floor):
        axes.set_ylim(bottom=floor)


def _line(axes: Axes, line: Line, before: Line | None, floor: float, name: str) -> None:
    y, few = np.where(line.y > floor, line.y, np.nan), line.y.size <= SINGLE_POINTS
    color, bars = PALETTE[line.look.color], line.stderr if few else None
    bands = [] if line.low is None or line.high is None else [(line.low, line.high)]
    if line.stderr is not None and not few and not line.dots:
        bands.append((y - line.stderr, y + line.stderr))
    if line.fill and before is not None:
        bands.append((np.interp(line.x, before.x, before.y), y))
    for low, high in bands:
        low, high = np.maximum(low, floor), np.maximum(high, floor)
        axes.fill_between(line.x, low, high, color=color, alpha=0.2, linewidth=0)
    marked = line.dots or (line.markers and few)
    axes.errorbar(
        line.x, y, bars, color=color, capsize=2, label=_in_legend(name), elinewidth=0.8,
        linestyle="none" if line.dots else DASHES[line.look.paper_dash or line.look.dash],
        linewidth=0.9 if line.look.thin else 1.2, marker=MARKERS[line.look.marker] if marked else "",
        markersize=3.5 if few and not line.look.thin else 1.5, mfc="white" if line.look.hollow else color,
    )  # fmt: skip


def _legend(figure: Figure, axes: Axes, wanted: bool | None) -> None:
    """Adds the legend: within the axes where it is small, else above them."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels or (len(labels) < 2 and not wanted) or wanted is False:
        return
    if len(labels) <= 4 and max(map(len, labels)) <= 30:
        axes.legend()
    else:
        figure.legend(loc="outside upper center", ncols=2, fontsize=6, columnspacing=1.0)


def _heatmap(figure: Figure, axes: Axes, picture: Heatmap) -> None:
    ratios, percent = picture.value.scale == "ratio", 100 if picture.value.percent else 1
    end = scale_end(picture)
    drawn = powers_of_two(picture.values, end) if ratios else percent * picture.values
    two_sided, end = ratios or picture.signed, end if ratios else percent * end
    image = axes.imshow(
        np.ma.masked_invalid(drawn),
        cmap="PuOr" if two_sided else "cividis",
        vmin=-end if two_sided else 0.0,
        vmax=end,
        aspect="equal" if picture.square else "auto",
    )
    if picture.marked is not None:
        row, column = np.nonzero(picture.marked)
        axes.plot(column, row, ".", color="black", markersize=2.5)
    steps = are_steps(picture.columns)
    columns = [
        f"{name:,}" if steps else plain(short(str(name))) for name in np.asarray(picture.columns).tolist()
    ]
    rows = [plain(short(str(name))) for name in picture.rows]
    # Beyond some thirty labels a column has no room for every name.
    ticks = range(0, len(columns), max(1, len(columns) // (10 if steps else 30)))
    crowded = len(columns) > 6 or max(map(len, columns), default=0) > 6
    axes.set_xticks(ticks, [columns[i] for i in ticks], rotation=45 if steps else 90 if crowded else 0)
    ticks = range(0, len(rows), max(1, len(rows) // 30) if picture.square else 1)
    axes.set_yticks(ticks, [rows[i] for i in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_words(picture.x))
    bar: Any = figure.colorbar(
        image, ax=axes, label=_words(picture.value), pad=0.03, shrink=0.85 if picture.square else 1
    )
    bar.outline.set_visible(False)
    if ratios:
        powers = range(-int(end), int(end) + 1)
        bar.ax.set_yticks(powers, [fraction(power) for power in powers])


def _dots(axes: Axes, picture: Dots) -> None:
    places = np.arange(len(picture.rows))
    for points in picture.points:
        (_bars if picture.bars else _points)(axes, places, points)
    _axis(axes, "x", picture.x, [points.values for points in picture.points])
    axes.set_yticks(places, [plain(name if picture.bars else short(name)) for name in picture.rows])
    axes.set_ylim(len(places) - 0.4, -0.6)
    if picture.bars:
        axes.set_xlim(0, 1.5 * max(1.0, axes.dataLim.x1))  # room for the words at the bars' ends


def _points(axes: Axes, places: np.ndarray, points: Points) -> None:
    color, look = PALETTE[points.look.color], points.look
    axes.errorbar(
        points.values, places, xerr=points.stderr, linestyle="none", marker=MARKERS[look.marker], color=color,
        mfc="white" if look.hollow else color, label=_in_legend(points.label),
    )  # fmt: skip


def _bars(axes: Axes, places: np.ndarray, points: Points) -> None:
    at = np.flatnonzero(np.isfinite(points.values))
    values, ends = points.values[at], points.values[at]
    axes.barh(places[at], values, height=0.65, color=PALETTE[points.look.color])
    if points.low is not None and points.high is not None:
        ends = np.fmax(values, points.high[at])
        spread = np.nan_to_num([values - points.low[at], ends - values])
        axes.errorbar(
            values, places[at], xerr=spread, fmt="none", color=PALETTE["ink"], linewidth=0.8, capsize=2
        )
    for i, end in zip(at.tolist(), ends, strict=True):
        if points.notes is not None:
            words: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
            axes.annotate(plain(points.notes[i]), (end, places[i]), (3, 0), **words)


def _words(axis: Axis) -> str:
    units = ", ".join(part for part in (plain(axis.units), "%" if axis.percent else "") if part)
    return f"{plain(axis.words)} ({units})" if units else plain(axis.words)


def _in_legend(name: str) -> str | None:
    """Returns a name as the legend takes it, which leaves out what begins with an underscore."""
    return "_nolegend_" if not name else f" {plain(name)}" if name.startswith("_") else plain(name)


def _axis(axes: Axes, which: str, axis: Axis, values: Sequence[Any]) -> None:
    """Gives one of two axes its scale, ticks, words and the line across, as suits the numbers along it."""
    one: Any = axes.xaxis if which == "x" else axes.yaxis
    across: Any = axes.axvline if which == "x" else axes.axhline
    found = whole_range(axis, values)
    if axis.scale != "linear" and (whole_range(Axis(), values) > 0).any():
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    at = 1.0 if axis.scale == "ratio" else axis.at
    if at is not None:
        across(at, **ACROSS | {"linestyle": ":" if axis.at_words else "-"})
    elif axis.scale == "linear" and which == "y" and found.size and found.min() <= 0 <= found.max():
        across(0, **ACROSS)
    ticks = list(axis.ticks) or (ratio_ticks(found) if axis.scale == "ratio" else [])
    if ticks:
        one.set_major_locator(FixedLocator(ticks))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    elif axis.percent:
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g}"))
    elif axis.whole:
        one.set_major_locator(MaxNLocator(integer=True))
    if axis.from_zero and found.size and found.min() >= 0:
        (axes.set_xlim if which == "x" else axes.set_ylim)(0, None)
    if axis.reverse:
        one.set_inverted(True)
    one.set_label_text(_words(axis))
