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
from hessprobe.instruments.cross_layer.answers import NO_ROWS, CrossLayerAnswers
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy
from hessprobe.instruments.cross_layer.pictures import pictures
from hessprobe.instruments.gn_hessian.figures import discrepancy_drawings
from hessprobe.instruments.preconditioner.figures import preconditioner_drawings
from hessprobe.instruments.train import figures as training_figures
from hessprobe.pictures import matplotlib_pen, paper
from hessprobe.pictures.picture import Picture
from hessprobe.reading.labelled import Labelled

Draw = Callable[[], tuple[Figure, xr.Dataset | xr.DataArray]]


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
    groupings: GroupingStudy | None = None,
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
    drawings: dict[str, Draw] = _cross_layer(run, step, groupings)
    # Of a table that was not recorded the page says which flag records it.
    if "gn_hessian" in run.children:
        drawings |= discrepancy_drawings(run)
    if "preconditioner" in run.children:
        drawings |= preconditioner_drawings(run)
    if training:
        drawings |= {
            "loss": partial(training_figures.loss_curve, run),
            "loss_by_tokens": partial(training_figures.loss_curve, run, "tokens"),
            "loss_by_seconds": partial(training_figures.loss_curve, run, "seconds"),
            "step_size": partial(training_figures.step_size_over_training, run),
            "decrease": partial(training_figures.decrease_over_training, run),
        }
    # A step that was asked for and not measured is a mistake in the call.
    return save_drawings(drawings, folder, prefix=prefix, wanted="" if step is None else "coupling")


# Until the report asks instruments through their registry.
def _cross_layer(run: xr.DataTree, step: int | None, groupings: GroupingStudy | None) -> dict[str, Draw]:
    """Returns {figure: function that draws it} of one run; without a table each says which flag records it."""
    known = "cross_layer" in run.children
    table = run["cross_layer"].to_dataset() if known else NO_ROWS
    answers = CrossLayerAnswers(
        table, train=run["train"].to_dataset() if "train" in run.children else None, groupings=groupings
    )
    runs = [Labelled(label="", answers=answers, compared=answers)]

    def drawing(picture: Picture) -> tuple[Figure, Any]:
        if not known:
            raise UserError("this run holds no table 'cross_layer'; --probe cross_layer records it")
        return matplotlib_pen.draw(picture), picture.data

    shown = [picture for picture in pictures(runs, step) if picture.where != "page"]
    return {picture.name: partial(drawing, picture) for picture in shown}


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
            written += paper.save(figure, folder, f"{prefix}{name}")
    return FigureSet(written=written, left_out=left_out)
