"""Every figure that a run's log can give, written as PDF and PNG; for what it cannot, the line that says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from hessprobe.errors import UserError
from hessprobe.instruments.instrument import Instrument
from hessprobe.instruments.registry import EVERY_RUN
from hessprobe.pictures import matplotlib_pen
from hessprobe.pictures.picture import Picture
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import sound_rows
from hessprobe.report.asking import ask, readers
from hessprobe.report.sections import pictures_of
from hessprobe.store.reader import require_table

Draw = Callable[[], tuple[Figure, xr.Dataset | xr.DataArray | None]]


@dataclass(frozen=True, kw_only=True)
class FigureSet:
    """The files written, and {figure: why not} of those that could not be drawn, or {instrument: why not} of all its own."""

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
    if step is not None:
        _check_measured(run, step)
    drawings = figures_of(run, step=step, training=training, groupings=groupings)
    wanted = [each for each in readers([run]) if training or each.name != EVERY_RUN]
    unrecorded = {
        each.name: f"this run holds no table {each.name!r}; {each.recorded_with} records it"
        for each in wanted
        if each.name not in run.children
    }
    saved = save_drawings(drawings, folder, prefix=prefix)
    return replace(saved, left_out=saved.left_out | unrecorded)


def figures_of(
    run: xr.DataTree, *, step: int | None = None, training: bool = True, groupings: Any = None
) -> dict[str, Draw]:
    """Returns what draws each figure of an opened run, by name; arguments as of `save_figures`."""
    asked = ask([run], upto=step)
    if groupings is not None and "cross_layer" in asked.runs:
        vars(asked.runs["cross_layer"][0].answers)["groupings"] = groupings
    drawings: dict[str, Draw] = {}
    for each in readers([run]):
        if each.name in run.children and (training or each.name != EVERY_RUN):
            drawings |= drawings_of(each, asked.runs[each.name][0])
    return drawings


def drawings_of(instrument: Instrument, run: Labelled[Any]) -> dict[str, Draw]:
    """Returns {file name: what draws it and returns it with its data} of an instrument's figures of one run."""
    found = pictures_of(instrument, [run])
    return {picture.name: partial(_draw, picture) for picture in found if picture.where != "page"}


def _check_measured(run: xr.DataTree, step: int) -> None:
    """Raises UserError where the coupling was not measured at a step: one that was asked for is a mistake in the call."""
    measured = sound_rows(require_table(run, "cross_layer"), "coupling")["step"].values
    if step not in measured:
        raise UserError(f"step {step} was not measured; measured: {', '.join(str(s) for s in measured[:20])}")


def _draw(picture: Picture) -> tuple[Figure, xr.Dataset | xr.DataArray | None]:
    return matplotlib_pen.draw(picture), picture.data


def save_drawings(drawings: Mapping[str, Draw], folder: Path, *, prefix: str = "") -> FigureSet:
    """Writes figures by name into a folder; of what cannot be drawn, the line that says why."""
    written: list[Path] = []
    left_out: dict[str, str] = {}
    for name, draw in drawings.items():
        try:
            figure, _ = draw()
        except UserError as error:
            left_out[name] = str(error)
        else:
            written += matplotlib_pen.save(figure, folder, f"{prefix}{name}")
    return FigureSet(written=written, left_out=left_out)
