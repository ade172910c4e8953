"""The comparison's charts as plotly figures: loss against what was spent, steps to the target, learning rates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.comparison.compared import Comparison, spent
from hessprobe.comparison.findings import reading_order, steps_said
from hessprobe.pictures.charts import ERROR_BARS_UP_TO, drawn_points, layout, shown

COLORS = tuple(f"var(--series-{n})" for n in range(1, 8))
DASHES = ("solid", "dash", "dot", "dashdot")
SPENT = {
    "steps": "step",
    "tokens_with_line_search": "tokens, line search included",
    "gradient_equivalents": "gradient equivalents",
}


def comparison_charts(comparison: Comparison) -> dict[str, go.Figure]:
    """Returns the section's charts by name; that of learning rates only where some method tried several."""
    charts = {f"loss_{measure}": loss_chart(comparison, measure) for measure in SPENT}
    charts["steps_to_target"] = steps_chart(comparison)
    rates = rates_chart(comparison)
    return charts | ({"learning_rates": rates} if rates is not None else {})


def looks(comparison: Comparison) -> Iterator[tuple[xr.Dataset, int]]:
    """Yields the best group of each variant in reading order, with the number that sets its colour and dash."""
    groups = comparison.groups.isel(group=reading_order(comparison.groups))
    for number, i in enumerate(np.flatnonzero(groups["best"].values)):
        yield groups.isel(group=i), number


def loss_chart(comparison: Comparison, measure: str) -> go.Figure:
    """Returns held-out loss against what was spent, a line a seed of each variant's best learning rate."""
    figure = go.Figure(layout=layout(SPENT[measure], "held-out loss, nats per token"))
    legend = measure == "steps"  # the other charts use the same colours
    figure.update_layout(showlegend=legend)
    for group, number in looks(comparison):
        label = shown(str(group["label"].values))
        members = np.flatnonzero(comparison.runs["group"].values == int(group["group"]))
        for first, member in zip([True, *[False] * len(members)], members, strict=False):
            run = comparison.runs.isel(run=member)
            curve = comparison.curves[str(run["run"].values)]
            loss, x = curve["held_out_loss"].values, spent(curve, measure)
            keep = drawn_points(loss)
            figure.add_scatter(
                x=x[keep],
                y=loss[keep],
                name=label,
                legendgroup=label,
                showlegend=legend and first,
                mode="lines+markers" if loss.size <= ERROR_BARS_UP_TO else "lines",
                line={"color": COLORS[number % len(COLORS)], "width": 1.5, "dash": _dash(number)},
                marker={"size": 3},
                hovertemplate=f"{label}, seed {int(run['seed'])}<br>{SPENT[measure]} %{{x:,}}: %{{y:.4g}}"
                "<extra></extra>",
            )
    figure.add_hline(
        y=comparison.target,
        line={"color": "var(--muted)", "width": 1, "dash": "dot"},
        annotation={"text": f"target {comparison.target:.6g}", "font": {"color": "var(--muted)"}},
        annotation_position="top right",
    )
    return figure


def steps_chart(comparison: Comparison) -> go.Figure:
    """Returns a bar a variant: mean steps to the target, with the range over seeds; words where there is none."""
    figure = go.Figure(layout=layout("steps to the target", "", showlegend=False))
    for group, number in looks(comparison):
        steps = group.sel(measure="steps")
        mean, least, most = (float(steps[name]) for name in ("mean", "least", "most"))
        several = int(group["seeds"]) > 1 and np.isfinite(mean)
        said, name = steps_said(group), broken(shown(str(group["label"].values)), "<br>")
        figure.add_bar(
            orientation="h",
            y=[name],
            x=[mean if np.isfinite(mean) else 0.0],
            marker={"color": COLORS[number % len(COLORS)]},
            error_x={
                "type": "data",
                "array": [most - mean],
                "arrayminus": [mean - least],
                "color": "var(--ink)",
            }
            if several
            else None,
            hovertemplate=f"{name}<br>{said} steps"
            + (f"<br>{least:,.0f} to {most:,.0f} over seeds" if several else "")
            + "<extra></extra>",
        )
        figure.add_scatter(
            x=[most if several else np.nan_to_num(mean)],
            y=[name],
            text=[f"  {said}"],
            mode="text",
            textposition="middle right",
            hoverinfo="skip",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    longest = np.nanmax(
        comparison.groups["most"].sel(measure="steps").where(comparison.groups["best"]), initial=1.0
    )
    figure.update_xaxes(range=[0, 1.4 * longest], showgrid=True)  # room for the numbers
    return figure


def rates_chart(comparison: Comparison) -> go.Figure | None:
    """Returns steps to the target against learning rate, a line a variant; None where none tried two that reached it."""
    figure = go.Figure(layout=layout("learning rate", "steps to the target", showlegend=True))
    for best, number in looks(comparison):
        sweep = swept(comparison, int(best["variant"]))
        if sweep.sizes["group"] < 2:
            continue
        steps, label = sweep.sel(measure="steps"), shown(str(best["label"].values))
        figure.add_scatter(
            x=sweep["learning_rate"].values,
            y=steps["mean"].values,
            customdata=sweep["seeds"].values,
            error_y={"type": "data", "array": steps["stderr"].values, "thickness": 1.2, "width": 3},
            name=label,
            mode="lines+markers",
            line={"color": COLORS[number % len(COLORS)], "width": 1.5, "dash": _dash(number)},
            hovertemplate=f"{label}<br>learning rate %{{x}}: %{{y:.4g}} steps (seeds: %{{customdata}})<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_xaxes(type="log")
    figure.update_yaxes(rangemode="tozero")
    return figure


def swept(comparison: Comparison, variant: int) -> xr.Dataset:
    """Returns the groups of a variant at which every seed reached the target, by learning rate."""
    groups = comparison.groups.isel(group=np.flatnonzero(comparison.groups["variant"].values == variant))
    reached = np.isfinite(groups["mean"].sel(measure="steps").values) & np.isfinite(
        groups["learning_rate"].values
    )
    return groups.isel(group=np.flatnonzero(reached)).sortby("learning_rate")


def broken(label: str, end: str) -> str:
    """Returns a variant's label in lines, for an axis with little room."""
    return label.replace(" at ", f"{end}at ", 1).replace(", ", end)


def _dash(number: int) -> str:
    return DASHES[number // len(COLORS) % len(DASHES)]
