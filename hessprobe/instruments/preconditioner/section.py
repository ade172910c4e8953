"""The page's section on preconditioners: when pairs of layers pay, who comes near, and where each layer loses."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.preconditioner import charts as charts_of
from hessprobe.instruments.preconditioner.answers import (
    FULL,
    LAYERWISE,
    candidate_failures,
    efficiency,
    preconditioner_rows,
    scoreboard,
)
from hessprobe.instruments.preconditioner.block_findings import largest_residual
from hessprobe.instruments.preconditioner.blocks import block_losses, block_steps, damping_of
from hessprobe.instruments.preconditioner.decrease_ratios import cross_layer_pays, decrease_ratios
from hessprobe.instruments.preconditioner.findings import LOOSE
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.rows import failed_rows
from hessprobe.reading.symmetry import asymmetry
from hessprobe.reading.trend import STANDARD_ERRORS


def preconditioner(run: xr.DataTree) -> Section:
    """Returns the section on preconditioners, or one that says which flag records it."""
    section = partial(
        Section, name="preconditioner", title="Preconditioners", template="preconditioner.html.j2"
    )
    table, reason = table_or_reason(run, "preconditioner")
    if table is None:
        return section(missing=reason)
    rows, failed = preconditioner_rows(table), failed_rows(table)
    if rows is None:
        return section(missing="No row of the table 'preconditioner' holds a number yet.", failed=failed)
    pays, ratios = cross_layer_pays(rows), decrease_ratios(rows)
    board = _ranked(scoreboard(rows))
    content = {
        "step": int(rows["step"].values[-1]),
        "measured": rows.sizes["step"],
        "columns": min(rows.sizes["step"], charts_of.COLUMNS_DRAWN),
        "damping": float(rows["damping"].values[0]),
        "sizes": rows["curvature_sequences"].values.tolist(),
        "size": int(rows["curvature_sequences"].values[-1]),
        "block_damping": damping_of(rows),
        "held_out": int(rows.attrs.get("held_out_sequences", rows.sizes["fold"])),
        "folds": rows.sizes["fold"],
        "draws": rows.sizes["draw"],
        "tolerance": float(rows.attrs.get("cg_tolerance", np.nan)),
        "residual": _largest(rows),
        "pays": [_verdict(rows, pays.isel(damping=i)) for i in range(pays.sizes["damping"])],
        "board": _board(board, ratios),
        "failures": _failures(rows),
        "asymmetry": asymmetry(table),
    }
    return section(content=content, charts=_charts(rows, pays, ratios, board), failed=failed)


def _charts(
    rows: xr.Dataset, pays: xr.Dataset, ratios: xr.Dataset, board: xr.Dataset
) -> dict[str, go.Figure]:
    names, charts = board["candidate"].values, {"scoreboard": charts_of.scoreboard_chart(board)}
    if pays.sizes["damping"] and np.isfinite(pays["ratio"].values).any():
        charts["layerwise_over_full"] = charts_of.pays_chart(pays)
        if rows.sizes["step"] > 1:
            over = decrease_ratios(rows.sel(candidate=[LAYERWISE, FULL]), other=FULL)
            over = over.sel(candidate=LAYERWISE).isel(curvature_sequences=-1)
            charts["layerwise_over_full_steps"] = charts_of.pays_over_training(
                over.transpose("step", "damping")
            )
    if rows.sizes["step"] > 1:
        over = efficiency(rows).sel(candidate=names)
        end = float(np.nanmax([over[name].max() for name in ("own", "held_out")]))
        for name in ("own", "held_out"):
            charts[f"efficiency_{name}"] = charts_of.efficiency_over_training(over, name, end)
    if np.isfinite(ratios["ratio"].values).any():
        others = [name for name in names if name != LAYERWISE]
        charts["over_layerwise"] = charts_of.over_layerwise_chart(ratios.sel(candidate=others))
    losses = block_losses(rows.isel(step=[-1])).isel(step=0).sel(candidate=names)
    if np.isfinite(losses["efficiency"].values).any():
        charts["block_efficiency"] = charts_of.block_efficiency_chart(losses)
    steps = block_steps(rows.isel(step=-1)).sel(candidate=names)
    if np.isfinite(steps["gain"].values).any():
        charts["block_steps"] = charts_of.block_steps_chart(steps)
    if np.isfinite(steps["multiplier"].values).any():
        charts["block_rates"] = charts_of.block_rates_chart(steps)
    return charts


def _ranked(board: xr.Dataset) -> xr.Dataset:
    """Returns the candidates in the order of their held-out efficiency, those not judged last."""
    return board.isel(candidate=np.argsort(-board["held_out"].values, kind="stable"))


def _verdict(rows: xr.Dataset, each: xr.Dataset) -> dict[str, Any]:
    known = np.flatnonzero(np.isfinite(each["ratio"].values))
    last = each.isel(curvature_sequences=known[-1] if known.size else -1)
    names = ("crossover", "crossover_low", "crossover_high", "below", "above")
    return {
        "damping": float(each["damping"]),
        "unfinished": largest_residual(rows, float(each["damping"]), FULL, LAYERWISE) > LOOSE,
        "verdict": str(each["verdict"].values),
        "ratio": float(last["ratio"]),
        "stderr": float(last["stderr"]),
        "own": float(last["own_ratio"]),
        "own_stderr": float(last["own_stderr"]),
        "size": int(last["curvature_sequences"]),
        "told": [int(size) for size in each["curvature_sequences"].values[each["ahead"].values != 0]],
        **{name: float(each[name]) for name in names},
    }


def _board(board: xr.Dataset, ratios: xr.Dataset) -> list[dict[str, Any]]:
    """Returns the scoreboard's rows for the template: the last measured row beside the layerwise oracle over all."""
    at = ratios.isel(damping=0, curvature_sequences=-1)
    rows = []
    for i, name in enumerate(board["candidate"].values):
        numbers = {
            str(key): float(values.values[i])
            for key, values in board.data_vars.items()
            if key not in ("failure", "uphill")
        }
        ratio, stderr = (float(at[key].sel(candidate=name)) for key in ("ratio", "stderr"))
        rows.append(
            numbers
            | {
                "name": str(name),
                "ratio": ratio,
                "stderr": stderr,
                "apart": bool(abs(ratio - 1) > STANDARD_ERRORS * stderr),
                "uphill": bool(board["uphill"].values[i]),
                "failure": str(board["failure"].values[i]),
            }
        )
    return rows


def _failures(rows: xr.Dataset) -> list[dict[str, Any]]:
    """Returns {candidate, reason, steps} of the candidates that could not be judged, the first reason of each."""
    found: dict[str, dict[str, Any]] = {}
    if "candidate_failure" not in rows:
        return []
    reasons = rows[["candidate_failure"]].load()
    failing = np.flatnonzero((reasons["candidate_failure"] != "").any("candidate").values)
    for i, step in zip(failing, rows["step"].values[failing].tolist(), strict=True):
        for name, reason in candidate_failures(reasons.isel(step=i)).items():
            entry = found.setdefault(name, {"candidate": name, "reason": reason, "steps": []})
            entry["steps"].append(step)
    return list(found.values())


def _largest(rows: xr.Dataset) -> float | None:
    """Returns the largest relative residual of any solve behind these numbers."""
    names = ("solver_residual", "optimal_residual", "optimal_residual_held_out")
    values = np.concatenate([np.ravel(rows[name].values) for name in names])
    values = values[np.isfinite(values)]
    return float(values.max()) if values.size else None
