"""The part of the cross-layer section that says which layers a preconditioner should join, as charts and words."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.cross_layer.answers import jacobi_radius
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, ranked_gains
from hessprobe.pictures.charts import ACCENT, DIVERGING, SECOND, evenly_spaced, layout, shown
from hessprobe.reading.rows import sound_rows

# Of many pairs, the ends of the ranking.
HIGHEST, LOWEST = 12, 4
STEP_SIZES_DRAWN = 1000


def grouping_content(study: GroupingStudy) -> dict[str, Any]:
    """Returns what the template says of groupings: the reason there are none, or what they rest on."""
    if study.reason:
        return {"reason": study.reason}
    content: dict[str, Any] = {
        "reason": "",
        "step": int(study.last["step"]),
        "basis": study.basis,
        "damping": study.damping,
        "wanted": study.wanted,
        "left_out": study.left_out,
        "rows": study.over_training.sizes["step"],
        "measured": study.measured,
    }
    if study.has("merge_gain"):
        gains = ranked_gains(study)
        resolved, above = gains["resolved"].values, gains["gain"].values > 0
        content |= {
            "pairs": gains.sizes["pair"],
            "adding": int((resolved & above).sum()),
            "costing": int((resolved & ~above).sum()),
        }
    return content


def grouping_charts(study: GroupingStudy) -> dict[str, go.Figure]:
    """Returns the charts of what the study holds; none where it holds only a reason."""
    charts: dict[str, go.Figure] = {}
    if study.has("merge_gain"):
        charts["merge_gains"] = _gains_chart(study)
    if study.has("captured"):
        charts["grouping_curve"] = _curve_chart(study)
    if study.has("importance"):
        charts["importance"] = _importance_chart(study)
    return charts


def overshoot_chart(table: xr.Dataset, train: xr.Dataset | None) -> go.Figure | None:
    """Returns the largest stable layerwise step, 2 / jacobi_radius, beside the step sizes the line search chose."""
    radius = jacobi_radius(table)
    if radius.sizes["step"] == 0:
        return None
    keep = evenly_spaced(radius.sizes["step"], STEP_SIZES_DRAWN)
    radius = radius.isel(step=keep)
    steps, low, high = radius["step"].values, radius["low"].values, radius["high"].values
    figure = go.Figure(layout=layout("step", "step size", showlegend=True, yaxis_rangemode="tozero"))
    said = (
        "step %{x}: layerwise steps up to %{customdata[0]:.3g} to %{customdata[1]:.3g} are stable<br>"
        "jacobi_radius %{customdata[2]:.3g} to %{customdata[3]:.3g}<extra></extra>"
    )
    numbers = np.stack([2 / high, 2 / low, low, high], axis=1)
    edge = {"x": steps, "customdata": numbers, "hovertemplate": said, "legendgroup": "stable"}
    few = "lines+markers" if steps.size <= 60 else "lines"
    look = {"line": {"color": ACCENT, "width": 1.4}, "marker": {"size": 5, "color": ACCENT}, "mode": few}
    figure.add_scatter(**edge, **look, y=2 / high, showlegend=False)
    name = "2 / jacobi_radius, its two estimates"
    figure.add_scatter(**edge, **look, y=2 / low, name=name, fill="tonexty", fillcolor="var(--band)")
    chosen = None if train is None else sound_rows(train, "step_size")
    if chosen is not None and chosen.sizes["step"]:
        some = evenly_spaced(chosen.sizes["step"], STEP_SIZES_DRAWN)
        figure.add_scatter(
            x=chosen["step"].values[some],
            y=chosen["step_size"].values[some].astype(float),
            mode="markers",
            name="chosen by the line search",
            marker={"color": SECOND, "size": 6 if some.size <= 60 else 3},
            hovertemplate="step %{x}: the line search chose %{y:.3g}<extra></extra>",
        )
    return figure


def _gains_chart(study: GroupingStudy) -> go.Figure:
    gains = ranked_gains(study, HIGHEST, LOWEST)
    labels = [
        shown(f"{_short(first)} × {_short(second)}")
        for first, second in zip(gains["block"].values, gains["other_block"].values, strict=True)
    ]
    figure = go.Figure(layout=layout("gain over layerwise", "", showlegend=True, margin={"l": 20}))
    resolved = gains["resolved"].values.astype(bool)
    looks = (
        (resolved, "beyond two errors", ACCENT, "circle"),
        (~resolved, "not resolved", SECOND, "circle-open"),
    )
    for chosen, name, color, symbol in looks:
        at = np.flatnonzero(chosen)
        if at.size == 0:
            continue
        values, errors = gains["gain"].values[at], gains["stderr"].values[at]
        reasons = [shown(str(reason)).replace("; ", "<br>") for reason in gains["reason"].values[at]]
        figure.add_scatter(
            x=values,
            y=[labels[i] for i in at],
            mode="markers",
            name=name,
            marker={"color": color, "size": 8, "symbol": symbol},
            error_x={"type": "data", "array": errors, "thickness": 1.2, "width": 3, "color": color},
            customdata=[
                [error, f"<br>{reason}" if reason else ""]
                for error, reason in zip(errors, reasons, strict=True)
            ],
            hovertemplate="%{y}<br>%{x:.2%} ± %{customdata[0]:.2%}%{customdata[1]}<extra></extra>",
        )
    figure.update_xaxes(tickformat=".1~%", showgrid=True, zeroline=True)
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=labels[::-1],
        showgrid=False,
        title=None,
        range=[-0.7, len(labels) - 0.3],
    )
    return figure


def _curve_chart(study: GroupingStudy) -> go.Figure:
    last = study.last
    groups, captured, errors = (last[name].values for name in ("groups", "captured", "captured_stderr"))
    over, over_errors = last["curve"].values, last["curve_stderr"].values
    apart = last["captured_resolved"].values.astype(bool)
    notes = [
        ("layerwise" if not joined else f"joined {shown(joined)}")
        + ("" if not reason else f"<br>{shown(reason)}").replace("; ", "<br>")
        for joined, reason in zip(last["joined"].values, last["captured_reason"].values, strict=True)
    ]
    figure = go.Figure(layout=layout("groups", "captured share of full's decrease", showlegend=True))
    figure.add_scatter(
        x=groups,
        y=captured,
        mode="lines",
        line={"color": ACCENT, "width": 1.4},
        hoverinfo="skip",
        showlegend=False,
    )
    looks = (
        (apart, "beyond two errors from full", "circle"),
        (~apart, "not told apart from full", "circle-open"),
    )
    for chosen, name, symbol in looks:
        at = np.flatnonzero(chosen)
        if at.size == 0:
            continue
        figure.add_scatter(
            x=groups[at],
            y=captured[at],
            mode="markers",
            name=name,
            marker={"color": ACCENT, "size": 8, "symbol": symbol},
            error_y={"type": "data", "array": errors[at], "thickness": 1.2, "width": 3},
            customdata=[[errors[i], over[i], over_errors[i], notes[i]] for i in at],
            hovertemplate="%{x} groups: %{y:.2%} ± %{customdata[0]:.2%} of full<br>%{customdata[1]:.3f} ± "
            "%{customdata[2]:.3f} times layerwise<br>%{customdata[3]}<extra></extra>",
        )
    figure.update_xaxes(range=[len(groups) + 0.5, 0.5], dtick=1 if len(groups) <= 20 else None)
    figure.update_yaxes(tickformat=".0~%")
    return figure


def _importance_chart(study: GroupingStudy) -> go.Figure:
    rows = study.over_training
    names = [shown(_short(str(name))) for name in rows["block"].values]
    steps = [f"{step:,}" for step in rows["step"].values.tolist()]
    reached = rows["importance_reached"].values.astype(bool)
    values = np.where(reached, rows["importance"].values, np.nan).T
    largest = float(np.nanmax(np.abs(values))) if reached.any() else 1.0
    figure = go.Figure(layout=layout("step", "", margin={"l": 20, "t": 40}))
    figure.add_heatmap(
        x=steps,
        y=names,
        z=values,
        customdata=rows["importance_stderr"].values.T,
        zmin=-largest,
        zmax=largest,
        colorscale=DIVERGING,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="%{y} at step %{x}<br>%{z:.2%} ± %{customdata:.2%}<extra></extra>",
        colorbar={
            "orientation": "h", "x": 0.5, "y": 1.0, "yanchor": "bottom", "thickness": 8, "len": 1.0, "ypad": 4,
            "outlinewidth": 0, "tickformat": ".1~%", "nticks": 5,
        },
    )  # fmt: skip
    at, block = np.nonzero(rows["importance_resolved"].values)
    figure.add_scatter(
        x=[steps[i] for i in at],
        y=[names[i] for i in block],
        mode="markers",
        marker={"color": "var(--ink)", "size": 4},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed", title=None, showgrid=False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"
