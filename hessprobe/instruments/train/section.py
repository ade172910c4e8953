"""The page's sections on training (losses, step sizes, predicted and real decrease) and measuring's cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.train.answers import (
    decrease_ratio,
    loss_curve,
    measuring_costs,
    step_outcomes,
    summarize_training,
)
from hessprobe.instruments.train.charts import by_clock
from hessprobe.pictures.charts import ACCENT, SECOND, Series, over_steps
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.rows import failed_rows, sound_rows
from hessprobe.report.provenance import decoded


def training(run: xr.DataTree) -> Section:
    """Returns the section on training."""
    section = partial(Section, name="training", title="Training", template="training.html.j2")
    table, reason = table_or_reason(run, "train")
    if table is None:
        return section(missing=reason)
    summary = summarize_training(table)
    if summary is None:
        return section(missing="No step of the table 'train' holds a loss yet.", failed=failed_rows(table))
    curve = loss_curve(table)
    losses = [replace(_series(curve, "loss", "training loss", SECOND), markers=False)]
    if "held_out_loss" in curve:
        losses.append(_series(curve, "held_out_loss", "held-out loss", ACCENT))
    losses = [line for line in losses if line.values.size]
    charts = {"loss": over_steps(losses, "loss, nats per token")}
    clocks = by_clock(charts["loss"], [curve] * len(losses))
    step_size = replace(_series(table, "step_size", "step size", ACCENT), dots=True)
    if step_size.values.size:
        charts["step_size"] = over_steps([step_size], "step size", yaxis_rangemode="tozero")
    decreases = [
        _series(table, "actual_decrease", "real", ACCENT),
        replace(_series(table, "predicted_decrease", "predicted by the model", SECOND), dash="dot"),
    ]
    if all(line.values.size for line in decreases):
        charts["decrease"] = over_steps(decreases, "decrease, nats per token")
    return section(
        content={
            "summary": summary,
            "planned": _planned(run),
            "target": _target_reached(run, table),
            "clocks": {clock: each["label"] for clock, each in clocks.items()},
            "ratio": decrease_ratio(table),
            "outcomes": step_outcomes(table),
        },
        charts=charts,
        frames=clocks,
        failed=failed_rows(table),
    )


def costs(run: xr.DataTree) -> Section:
    """Returns the section on the costs of measuring."""
    section = partial(Section, name="costs", title="Costs of measuring", template="costs.html.j2")
    table = measuring_costs(run)
    if table.sizes["table"] == 0:
        reason = table_or_reason(run, "cross_layer")[1] or "No table of this run holds costs."
        return section(missing=reason)
    names = [str(name) for name in table["table"].values]
    rows = [
        {"table": name, **{str(key): float(column.values[i]) for key, column in table.items()}}
        for i, name in enumerate(names)
    ]
    colors = cycle((ACCENT, SECOND, "var(--negative)"))
    series = [
        _series(run[name].to_dataset(), "seconds", name, color)
        for name, color in zip(names, colors, strict=False)
    ]
    series = [line for line in series if line.values.size]
    charts: dict[str, go.Figure] = {}
    if series:
        charts["seconds"] = over_steps(series, "seconds per row", yaxis_rangemode="tozero")
    share = float(table["share_of_run"].sum(skipna=False))
    return section(content={"rows": rows, "share": share if np.isfinite(share) else None}, charts=charts)


def _planned(run: xr.DataTree) -> int | None:
    """Returns how many steps the run's recipe asks for; None where it does not say."""
    steps = _asked(run).get("steps")
    return steps if isinstance(steps, int) else None


def _target_reached(run: xr.DataTree, table: xr.Dataset) -> float | None:
    """Returns the held-out loss at which the run was to end early, if a recorded row reached it: the run is whole."""
    target, losses = _asked(run).get("stop_at"), sound_rows(table, "held_out_loss")
    if not isinstance(target, int | float) or not losses.sizes["step"]:
        return None
    return float(target) if float(losses["held_out_loss"].min()) <= target else None


def _asked(run: xr.DataTree) -> dict[str, Any]:
    """Returns the section [training] of the run's recipe; empty where there is none."""
    asked = decoded(run.attrs.get("recipe")).get("training")
    return asked if isinstance(asked, dict) else {}


def _series(table: xr.Dataset, variable: str, label: str, color: str) -> Series:
    rows = sound_rows(table, variable)
    values = rows[variable].values.astype(float) if variable in rows else np.empty(0)
    return Series(label=label, steps=rows["step"].values, values=values, color=color)
