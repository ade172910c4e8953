"""Every figure that a run's log can give, written as PDF and PNG; for what it cannot, the line that says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer import figures
from hessprobe.instruments.cross_layer.grouping import figures as grouping_figures
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, study_groupings
from hessprobe.instruments.gn_hessian.section import gn_hessian_drawings
from hessprobe.instruments.preconditioner.figures import preconditioner_drawings
from hessprobe.instruments.train.section import training_drawings
from hessprobe.pictures import paper

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
    drawings: dict[str, Draw] = {
        "coupling": partial(figures.coupling_heatmap, run, step),
        "coupling_by_distance": partial(figures.coupling_by_distance, run, step),
        "off_block_energy": partial(figures.off_block_energy_over_training, run),
        "cross_share": partial(figures.cross_share_over_training, run),
        "jacobi_radius": partial(grouping_figures.overshoot_over_training, run),
    }
    study = groupings
    if study is None and "cross_layer" in run.children:
        study = study_groupings(run["cross_layer"].to_dataset())
    study = study or GroupingStudy(
        reason="this run holds no table 'cross_layer'; --probe cross_layer records it"
    )
    drawings |= {
        "merge_gains": partial(grouping_figures.merge_gains, study),
        "grouping_curve": partial(grouping_figures.grouping_curve, study),
        "importance": partial(grouping_figures.importance_over_training, study),
    }
    # Of a table that was not recorded the page says which flag records it.
    if "gn_hessian" in run.children:
        drawings |= gn_hessian_drawings(run)
    if "preconditioner" in run.children:
        drawings |= preconditioner_drawings(run)
    if training:
        drawings |= training_drawings(run)
    # A step that was asked for and not measured is a mistake in the call.
    return save_drawings(drawings, folder, prefix=prefix, wanted="" if step is None else "coupling")


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
