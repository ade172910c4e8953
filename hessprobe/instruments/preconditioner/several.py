"""Several runs' preconditioners beside each other: when pairs of layers pay, and how near candidates come to layerwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.preconditioner.answers import FULL, LAYERWISE, efficiency, preconditioner_rows
from hessprobe.instruments.preconditioner.decrease_ratios import cross_layer_pays, decrease_ratios
from hessprobe.pictures.charts import layout, over_steps
from hessprobe.pictures.named_charts import add_dots, dotted, on_ratio_axis
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.pictures.several import Line, lines_over_steps, lines_with_errors, looks
from hessprobe.report.beside import Beside


def several_preconditioner(beside: Sequence[Beside]) -> Section:
    """Returns the section on preconditioners of several runs, or one that says which flag records it."""
    missing = [
        f"{run.label}: {reason}"
        for run in beside
        if (reason := table_or_reason(run.tree, "preconditioner")[1])
    ]
    charts = _charts(beside)
    section = partial(
        Section, name="preconditioner", title="Preconditioners", template="several_preconditioner.html.j2"
    )
    if not charts:
        return section(missing=" ".join(missing) or "No measured row holds a number yet.")
    said = [f"{run.label}: {_places(rows)}" for run in beside if (rows := _rows(run)) is not None]
    return section(charts=charts, content={"missing": missing, "said": said})


def _charts(beside: Sequence[Beside]) -> dict[str, go.Figure]:
    charts: dict[str, go.Figure] = {}
    pays = lines_with_errors(beside, _pays, "curvature sequences", "layerwise over full")
    if pays is not None:
        charts["layerwise_over_full"] = on_ratio_axis(pays, "y")
        traces: list[Any] = list(pays.data)
        sizes = sorted({int(size) for trace in traces for size in trace["x"]})
        pays.update_xaxes(type="log", tickvals=sizes, ticktext=[f"{size:,}" for size in sizes])
    over = lines_over_steps(beside, _pays_over_training)
    if any(line.steps.size > 1 for line in over):
        figure = over_steps(over, "layerwise over full").update_layout(showlegend=True)
        charts["layerwise_over_full_steps"] = on_ratio_axis(figure, "y")
    update = lines_over_steps(beside, _update)
    if update:
        options = {"y_format": ".1%", "yaxis_tickformat": ".0%"}
        figure = over_steps(update, "held-out efficiency of the update", **options)
        charts["update_efficiency"] = figure.update_layout(showlegend=True)
    dots = _over_layerwise(beside)
    if dots is not None:
        charts["over_layerwise"] = dots
    return charts


def _rows(run: Beside) -> xr.Dataset | None:
    if "preconditioner" not in run.tree.children:
        return None
    return preconditioner_rows(run.tree["preconditioner"].to_dataset())


def _places(rows: xr.Dataset) -> str:
    size, damping = int(rows["curvature_sequences"].values[-1]), float(rows["damping"].values[0])
    held_out = int(rows.attrs.get("held_out_sequences", rows.sizes["fold"]))
    return f"{size:,} curvature and {held_out:,} held-out sequences, damping {damping:g}"


def _pays(run: Beside) -> Line | None:
    rows = _rows(run)
    if rows is None:
        return None
    pays = cross_layer_pays(rows.isel(damping=[0]))
    if pays.sizes["damping"] == 0 or not np.isfinite(pays["ratio"].values).any():
        return None
    first = pays.isel(damping=0)
    return first["curvature_sequences"].values, first["ratio"].values, first["stderr"].values


def _pays_over_training(run: Beside) -> Line | None:
    rows = _rows(run)
    if rows is None or not {LAYERWISE, FULL} <= set(rows["candidate"].values):
        return None
    few = rows.sel(candidate=[LAYERWISE, FULL]).isel(damping=[0], curvature_sequences=[-1])
    at = decrease_ratios(few, other=FULL).sel(candidate=LAYERWISE).isel(damping=0, curvature_sequences=0)
    if not np.isfinite(at["per_step"].values).any():
        return None
    return at["step"].values, at["per_step"].values, at["per_step_stderr"].values


def _update(run: Beside) -> Line | None:
    rows = _rows(run)
    if rows is None or "update" not in rows["candidate"].values:
        return None
    over = efficiency(rows.sel(candidate=["update"])).isel(candidate=0)
    if not np.isfinite(over["held_out"].values).any():
        return None
    return over["step"].values, over["held_out"].values, over["held_out_stderr"].values


def _over_layerwise(beside: Sequence[Beside]) -> go.Figure | None:
    """Returns each candidate's held-out decrease over the layerwise oracle's, a colour for each run."""
    found = {}
    for run in beside:
        rows = _rows(run)
        if rows is not None:
            few = rows.isel(damping=[0], curvature_sequences=[-1])
            found[run.label] = decrease_ratios(few).isel(damping=0, curvature_sequences=0)
    found = {label: ratios for label, ratios in found.items() if np.isfinite(ratios["ratio"].values).any()}
    if not found:
        return None
    names = list(dict.fromkeys(str(name) for ratios in found.values() for name in ratios["candidate"].values))
    names = [name for name in names if name != LAYERWISE]
    figure = go.Figure(
        layout=layout("of layerwise's held-out decrease", "", showlegend=True, margin={"l": 20})
    )
    for run, look in looks(beside):
        if run.label in found:
            ratios = found[run.label].reindex(candidate=names)
            values, errors = ratios["ratio"].values, ratios["stderr"].values
            add_dots(figure, values, errors, names, run.label, look["color"], "circle", 7, percent=False)
    return dotted(on_ratio_axis(figure, "x"), names)
