"""The charts of several runs beside each other: a colour for each run, a coupling heatmap for each, their difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.cross_layer.answers import (
    coupling,
    coupling_by_distance,
    cross_share,
    jacobi_radius,
    off_block_energy,
)
from hessprobe.pictures.charts import matrix, over_steps
from hessprobe.pictures.several import Ask, Line, lines_over_steps, lines_with_errors
from hessprobe.reading.rows import sound_rows
from hessprobe.report.beside import Beside, coupling_difference


def cross_layer_charts(beside: Sequence[Beside]) -> dict[str, go.Figure]:
    """Returns the charts of the section on cross-layer importance, without those that no run can fill."""
    charts: dict[str, go.Figure] = {}
    matrices = {run.label: rows for run in beside if (rows := last_coupling(run)) is not None}
    end = max((float(np.nanmax(_off_diagonal(row))) for row in matrices.values()), default=1.0)
    for i, row in enumerate(matrices.values()):
        charts[f"coupling-{i}"] = _heatmap(row["coupling"], row["coupling_stderr"], limit=end, signed=False)
    apart = coupling_difference(*beside) if len(beside) == 2 else None
    if apart is not None and np.isfinite(apart["difference"].values).any():
        largest = float(np.nanmax(abs(apart["difference"].values)))
        charts["coupling-difference"] = _heatmap(
            apart["difference"], apart["stderr"], limit=largest, signed=True
        )
    lines: dict[str, tuple[Ask, str, dict[str, Any]]] = {
        "off_block_energy": (_energy, "off-block energy", {}),
        "cross_share": (
            _update_share,
            "cross share along the update",
            {"y_format": ".1%", "yaxis_tickformat": ".0%"},
        ),
        "gain": (_gain, "full over layerwise", {}),
        "overshoot": (_stable, "largest stable layerwise step", {"yaxis_rangemode": "tozero"}),
    }
    for name, (ask, title, options) in lines.items():
        series = lines_over_steps(beside, ask)
        if series:
            charts[name] = over_steps(series, title, **options).update_layout(showlegend=True)
    for name, ask, x in (("distance", _distances, "layers apart"), ("grouping_curve", _captured, "groups")):
        figure = lines_with_errors(
            beside, ask, x, "coupling" if name == "distance" else "captured share of full's decrease"
        )
        if figure is not None:
            charts[name] = figure
    if "grouping_curve" in charts:
        charts["grouping_curve"].update_xaxes(autorange="reversed")
        charts["grouping_curve"].update_yaxes(tickformat=".0~%")
    return charts


def _whole(run: Beside) -> xr.Dataset | None:
    """Returns all rows of a run: lines over training show what came after the step of comparison too."""
    return run.tree["cross_layer"].to_dataset() if run.table is not None else None


def _energy(run: Beside) -> Line | None:
    table = _whole(run)
    if table is None:
        return None
    energy = off_block_energy(table)
    return energy["step"].values, energy["off_block_energy"].values, energy["off_block_energy_stderr"].values


def _update_share(run: Beside) -> Line | None:
    table = _whole(run)
    rows = None if table is None else sound_rows(table, "step_curvature")
    if rows is None or rows.sizes["step"] == 0 or "update" not in rows["direction"].values:
        return None
    return rows["step"].values, cross_share(rows["step_curvature"].sel(direction="update")).values, None


def _gain(run: Beside) -> Line | None:
    if run.groupings.reason:
        return None
    rows = run.groupings.over_training
    rows = rows.isel(step=np.flatnonzero(rows["full_over_layerwise_reached"].values))
    return rows["step"].values, rows["full_over_layerwise"].values, rows["full_over_layerwise_stderr"].values


def _stable(run: Beside) -> Line | None:
    table = _whole(run)
    rows = None if table is None else jacobi_radius(table)
    return None if rows is None else (rows["step"].values, 2 / rows["high"].values, None)


def _distances(run: Beside) -> Line | None:
    rows = coupling_by_distance(run.table) if run.table is not None else None
    if rows is None or rows.sizes["step"] == 0 or rows.sizes["distance"] == 0:
        return None
    row = rows.isel(step=-1)
    return row["distance"].values, row["coupling"].values, row["coupling_stderr"].values


def _captured(run: Beside) -> Line | None:
    last = run.groupings.last
    if "captured" not in last:
        return None
    return last["groups"].values, last["captured"].values, last["captured_stderr"].values


def last_coupling(run: Beside) -> xr.Dataset | None:
    """Returns the last row of a run's coupling with its errors."""
    rows = coupling(run.table) if run.table is not None else None
    return None if rows is None or rows.sizes["step"] == 0 else rows.isel(step=-1)


def _off_diagonal(row: xr.Dataset) -> np.ndarray:
    values = row["coupling"].values
    return np.where(np.eye(len(values), dtype=bool), 0.0, values)


def _heatmap(values: xr.DataArray, stderr: xr.DataArray, *, limit: float, signed: bool) -> go.Figure:
    names = [str(name) for name in values["block"].values]
    hover = f"{'difference' if signed else 'coupling'} %{{z:.3g}} ± %{{customdata:.2g}}"
    figure = matrix(names, signed=signed, limit=limit, hover=hover, ticks=".2~g")
    blank = np.where(np.eye(len(names), dtype=bool), np.nan, values.values)
    return figure.update_traces(z=blank, customdata=stderr.values)
