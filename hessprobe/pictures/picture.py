"""Pictures as data: numbers, words with units, and names of looks. A pen draws one on the page, another on paper.

An instrument builds each picture once; findings, page and paper then speak of the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.pictures.looks import Look


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """An axis, or a scale of colours.

    Attributes:
        words: what is measured along it.
        units: its units; they follow the words.
        scale: `linear`, `log`, or `ratio`: logarithmic about a line at 1, with plain numbers as ticks.
        percent: numbers are fractions, shown as percentages.
        number: format of a number said at a point (`.4g`); default by `percent`.
        from_zero: the axis reaches zero.
        reverse: larger numbers come first.
        whole: whole numbers alone are ticks.
        ticks: the numbers at which there are ticks; none: as the pen finds best.
        at: a line across the picture at this number, with `at_words` beside it.
        decades: on a logarithmic axis, how many powers of ten below the largest number are drawn.
    """

    words: str = ""
    units: str = ""
    scale: str = "linear"
    percent: bool = False
    number: str = ""
    from_zero: bool = False
    reverse: bool = False
    whole: bool = False
    ticks: Sequence[float] = ()
    at: float | None = None
    at_words: str = ""
    decades: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """What every kind of picture has.

    Attributes:
        name: its chart's id on the page and its file's name.
        title: a few words above it on the page.
        caption: sentences below it on the page: how the numbers are to be read.
        at: the step and the settings it is of, said above it on paper.
        where: `page`, `paper` or `both`.
        missing: why there is nothing to draw; such a picture holds nothing else.
        data: the labelled numbers drawn in it.
        frames: what the page's slider over steps puts in place of the numbers, by name, step first.
    """

    name: str
    title: str = ""
    caption: str = ""
    at: str = ""
    where: str = "both"
    missing: str = ""
    data: xr.Dataset | xr.DataArray | None = None
    frames: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A line of `Lines`, each with its own places.

    Attributes:
        label: its name; a line without one stands neither in the legend nor in what is said at its points.
        x: places.
        y: values, NaN for a gap.
        stderr: standard errors: bars, or a band where points are many.
        low: the lower edge of a range about the values, of which errors say nothing (lowest and highest of some).
        high: its upper edge.
        look: how it looks.
        group: its name in the legend, where several lines share one.
        markers: whether single points are marked where there is room.
        dots: points alone, for values that jump between a few choices; of many, evenly spaced ones.
        fill: whether the space to the line before it is filled.
        notes: words said at each point, where `hover` has {note} or on a line after it.
        hover: what is said at a point, as `Lines.hover`, where it is another.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    stderr: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    look: Look = field(default_factory=Look)
    group: str = ""
    markers: bool = True
    dots: bool = False
    fill: bool = False
    notes: Sequence[str] | None = None
    hover: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines(Picture):
    """Lines over steps or anything else.

    Attributes:
        lines: in the order of the legend.
        x: the axis of places.
        y: the axis of values.
        hover: what is said at a point, with {x}, {y} (with its error), {range} (low to high) and {note} in it; may hold
            markup of ours, never a name. Default: the words of x, the place, the value.
        legend: whether there is one; default from two lines on.
    """

    lines: Sequence[Line] = ()
    x: Axis = field(default_factory=lambda: Axis(words="step"))
    y: Axis = field(default_factory=Axis)
    hover: str = ""
    legend: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Density(Lines):
    """Densities on a logarithmic scale, each with the range from its lowest to its highest estimate."""

    x: Axis = field(default_factory=lambda: Axis(words="eigenvalue", units="nats", number=".3g"))
    # A density's lowest point drawn, as a share of the highest: an eigenvalue of a billion.
    y: Axis = field(default_factory=lambda: Axis(words="density", scale="log", number=".2e", decades=9))
    hover: str = "at {x}: {y} (probes: {range})"
    legend: bool | None = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap(Picture):
    """Numbers as colours, rows from the top.

    Attributes:
        rows: names of the rows.
        columns: names of the columns; an array of numbers stands for steps, of which a page draws some.
        values: (row, column), NaN for a blank.
        stderr: standard errors, said at each cell.
        value: the words and the format of a number. With scale `ratio` colours follow its logarithm, and a number below
            zero takes the low end's colour; with `linear` they reach from zero.
        end: the number at the scale's end (in powers of two for ratios); default the largest in size.
        signed: whether a linear scale reaches equally far below zero.
        x: the axis of columns.
        marked: (row, column): cells with a dot.
        notes: words said at each cell, where `hover` has {note} or on a line after it.
        hover: what is said at a cell, with {row}, {column}, {value} (with error) in it.
        square: rows and columns are the same names.
    """

    rows: Sequence[str] = ()
    columns: Sequence[str] | np.ndarray = ()
    values: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    stderr: np.ndarray | None = None
    value: Axis = field(default_factory=Axis)
    end: float | None = None
    signed: bool = False
    x: Axis = field(default_factory=Axis)
    marked: np.ndarray | None = None
    notes: Sequence[Sequence[str]] | None = None
    hover: str = "{row}, {column}<br>{value}"
    square: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """A number for each row of `Dots`, NaN for none.

    Attributes:
        label: its name in the legend.
        values: (row,).
        stderr: standard errors.
        low: lower end of a range, in place of an error.
        high: its upper end.
        look: how it looks.
        notes: words said at each, where `hover` has {note} or on a line after it.
    """

    label: str
    values: np.ndarray
    stderr: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    look: Look = field(default_factory=Look)
    notes: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Dots(Picture):
    """Named rows from the top, with a dot and its error for each set of points.

    Attributes:
        rows: their names; a new line in a name is one in the tick.
        points: in the order of the legend.
        x: the axis of numbers.
        bars: bars from zero in place of dots, with each point's note at the end.
        hover: what is said at a point, with {row}, {label} and {x} (with its error) in it.
        legend: whether there is one.
    """

    rows: Sequence[str] = ()
    points: Sequence[Points] = ()
    x: Axis = field(default_factory=Axis)
    bars: bool = False
    hover: str = "{row}, {label}<br>{x}"
    legend: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Panels(Picture):
    """Lines that share their places: above each other in one figure on paper, charts of their own on the page."""

    panels: Sequence[Lines] = ()


def is_empty(picture: Picture) -> bool:
    """Tells whether a picture holds no number at all."""
    return not any(np.isfinite(values).any() for values in _numbers(picture))


def drawable(picture: Picture) -> None:
    """Raises UserError with the reason where a picture holds nothing to draw."""
    if is_empty(picture):
        raise UserError(picture.missing or f"no number for the picture {picture.name}; nothing to draw")


def _numbers(picture: Picture) -> list[np.ndarray]:
    match picture:
        case Lines():
            return [np.asarray(line.y, dtype=float) for line in picture.lines]
        case Heatmap():
            return [np.asarray(picture.values, dtype=float)]
        case Dots():
            return [np.asarray(points.values, dtype=float) for points in picture.points]
        case Panels():
            return [values for panel in picture.panels for values in _numbers(panel)]
    raise TypeError(f"no kind of picture: {type(picture).__name__}")


def are_steps(columns: Sequence[str] | np.ndarray) -> bool:
    """Tells whether a heatmap's columns are numbers, which stand for steps."""
    return isinstance(columns, np.ndarray) and columns.dtype.kind in "iuf"


def whole_range(axis: Axis, values: Sequence[Any]) -> np.ndarray:
    """Returns every finite number drawn along an axis, the line across included."""
    at = [] if axis.at is None else [[axis.at]]
    found = np.concatenate(
        [np.ravel(np.asarray(each, dtype=float)) for each in (*values, *at)] or [np.empty(0)]
    )
    return found[np.isfinite(found)]


def scale_end(picture: Heatmap) -> float:
    """Returns the number at the end of a picture's scale of colours: 2 powers of two, or the largest in size."""
    if picture.end is not None:
        return float(picture.end)
    if picture.value.scale == "ratio":
        return 2.0
    largest = float(np.nanmax(np.abs(picture.values), initial=0.0))
    return largest if 0 < largest < np.inf else 1.0


def powers_of_two(values: np.ndarray, end: float) -> np.ndarray:
    """Returns ratios as powers of two within the scale's ends; below zero the low end, NaN for a blank."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(values > 0, np.log2(values), np.where(np.isfinite(values), -end, np.nan))
    return np.clip(z, -end, end)


def floor_of(picture: Lines) -> float:
    """Returns the number below which nothing is drawn: some powers of ten below the highest, where the axis says so."""
    if picture.y.decades is None:
        return -np.inf
    return (
        max((float(np.nanmax(line.y, initial=0.0)) for line in picture.lines), default=0.0)
        * 10.0**-picture.y.decades
    )
