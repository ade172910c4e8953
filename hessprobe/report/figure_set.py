"""Every figure that a run's log can give, written as PDF and PNG; for what it cannot, the line that says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from hessprobe.analysis.grouping_study import GroupingStudy, study_groupings
from hessprobe.errors import UserError
from hessprobe.report import figures, grouping_figures

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
    if training:
        drawings["loss"] = partial(figures.loss_curve, run)
        drawings["decrease"] = partial(figures.decrease_over_training, run)
    written: list[Path] = []
    left_out: dict[str, str] = {}
    for name, draw in drawings.items():
        try:
            figure, _ = draw()
        except UserError as error:
            if step is not None and name == "coupling":
                raise  # a step that was asked for and not measured
            left_out[name] = str(error)
        else:
            written += figures.save(figure, folder, f"{prefix}{name}")
    return FigureSet(written=written, left_out=left_out)
