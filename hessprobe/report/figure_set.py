"""Every figure that a run's log can give, written as PDF and PNG; for what it cannot, the line that says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from hessprobe.errors import UserError
from hessprobe.instruments.registry import EVERY_RUN, reader_of
from hessprobe.pictures import matplotlib_pen
from hessprobe.pictures.picture import Picture
from hessprobe.report.asking import Asked, ask, readers
from hessprobe.report.sections import pictures_of
from hessprobe.report.until_slices import OLD

Draw = Callable[[], tuple[Figure, xr.Dataset | xr.DataArray | None]]


@dataclass(frozen=True, kw_only=True)
class FigureSet:
    """The files written, and {figure: why not} of those that could not be drawn."""

    written: list[Path]
    left_out: dict[str, str]


def save_figures(
    run: xr.DataTree,
    folder: Path,
    *,
    prefix: str = "",
    step: int | None = None,
    training: bool = True,
    groupings: Any = None,
) -> FigureSet:
    """Writes all figures of an opened run into a folder.

    Args:
        run: an opened run.
        folder: where to, made where missing.
        prefix: what file names begin with.
        step: the measured step whose coupling is drawn; default the last.
        training: whether figures on training alone are drawn too.
        groupings: what `study_groupings` said of its table, where it was asked before (it takes seconds).
    """
    drawings = figures_of(run, step=step, training=training, groupings=groupings)
    # A step that was asked for and not measured is a mistake in the call.
    return save_drawings(drawings, folder, prefix=prefix, wanted="" if step is None else "coupling")


def figures_of(
    run: xr.DataTree, *, step: int | None = None, training: bool = True, groupings: Any = None
) -> dict[str, Draw]:
    """Returns what draws each figure of an opened run, by name; arguments as of `save_figures`."""
    asked = ask([run], upto=step)
    if groupings is not None and "cross_layer" in asked.runs:
        vars(asked.runs["cross_layer"][0].answers)["groupings"] = groupings
    drawings: dict[str, Draw] = {}
    for each in readers([run]):
        if each.name != EVERY_RUN or training:
            drawings |= _drawings(each.name, asked, step)
    return drawings


def _drawings(name: str, asked: Asked, step: int | None) -> Mapping[str, Draw]:
    answered = asked.recorded(name)
    if name in OLD:
        return OLD[name].drawings(asked.trees[0], answered and answered.answers, step)
    # Of a table that was not recorded the page says which command records it.
    found = [] if answered is None else pictures_of(reader_of(name), [answered])
    return {picture.name: partial(_draw, picture) for picture in found if picture.where != "page"}


def _draw(picture: Picture) -> tuple[Figure, xr.Dataset | xr.DataArray | None]:
    return matplotlib_pen.draw(picture), picture.data


def save_drawings(
    drawings: Mapping[str, Draw], folder: Path, *, prefix: str = "", wanted: str = ""
) -> FigureSet:
    """Writes figures by name into a folder; the one `wanted` must be drawn, or its UserError is raised."""
    written: list[Path] = []
    left_out: dict[str, str] = {}
    for name, draw in drawings.items():
        try:
            figure, _ = draw()
        except UserError as error:
            if name == wanted:
                raise
            left_out[name] = str(error)
        else:
            written += matplotlib_pen.save(figure, folder, f"{prefix}{name}")
    return FigureSet(written=written, left_out=left_out)
