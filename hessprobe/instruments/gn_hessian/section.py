"""The page's section on Gauss-Newton against Hessian: how far apart, in which spectrum, and what that costs a step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.gn_hessian import charts as charts_of
from hessprobe.instruments.gn_hessian.answers import (
    GAUSS_NEWTON,
    HESSIAN,
    block_gap,
    curvature_ratio,
    gn_gap,
    measured,
    residual_by_block,
    traces,
)
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION, full_length, ladder
from hessprobe.instruments.gn_hessian.spectrum import extremes, negative_curvature, smoothed_density
from hessprobe.pictures.charts import evenly_spaced
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.rows import failed_rows, sound_rows
from hessprobe.reading.symmetry import asymmetry
from hessprobe.reading.wording import basis

# Any of these makes a row worth a page.
ASKED = ("gn_gap", "ritz_value", "direction_curvature", "change", "block_gn_gap", "trace")
DENSITIES_OVER_TRAINING = 5
DENSITY_BLOCKS = 8
LADDERS = {"update": "the update", "gauss_newton_step": "the Gauss-Newton step"}


def gn_hessian(run: xr.DataTree) -> Section:
    """Returns the section on Gauss-Newton against Hessian, or one that says which flag records it."""
    section = partial(
        Section, name="gn_hessian", title="Gauss-Newton against Hessian", template="gn_hessian.html.j2"
    )
    table, reason = table_or_reason(run, "gn_hessian")
    if table is None:
        return section(missing=reason)
    table, failed = table.load(), failed_rows(table)
    steps = sorted({int(step) for name in ASKED for step in sound_rows(table, name)["step"].values})
    if not steps:
        return section(missing="No row of the table 'gn_hessian' holds a number yet.", failed=failed)
    last = table.sel(step=steps[-1])
    content = {
        "step": steps[-1],
        "measured": len(steps),
        "basis": basis(last, exact=True),
        "samples": table.attrs.get("samples"),
        "block_samples": table.attrs.get("block_samples"),
        "lanczos": table.attrs.get("lanczos_steps"),
        "probes": table.sizes.get("probe"),
        "symmetry_gap": _largest(table, "symmetry_gap"),
        "asymmetry": asymmetry(table),
        "width": _width(table),
        "mass": _mass(table),
        "place": _place(table),
        "directions": _directions(table),
        "ladder": _ladder(table),
        "solve": _solve(table),
        "density_blocks": _density_blocks(table),
    }
    return section(content=content, charts=_charts(table), failed=failed)


def _charts(table: xr.Dataset) -> dict[str, go.Figure]:
    return {**_norm_charts(table), **_spectrum_charts(table), **_step_charts(table)}


def _norm_charts(table: xr.Dataset) -> dict[str, go.Figure]:
    charts: dict[str, go.Figure] = {}
    gap, blocks, trace = gn_gap(table), block_gap(table), traces(table)
    if gap.sizes["step"]:
        charts["gn_gap"] = charts_of.line_chart(
            gap, "gn_gap", "‖H − G‖ / ‖G‖", "‖H − G‖ / ‖G‖", yaxis_rangemode="tozero"
        )
        if np.isfinite(gap["cosine"].values).any():
            charts["gn_cosine"] = charts_of.line_chart(gap, "cosine", "cosine of H and G", "cosine")
    if blocks.sizes["step"]:
        charts["gn_block_gap"] = charts_of.block_gap_chart(blocks)
    if trace.sizes["step"]:
        charts["gn_trace"] = charts_of.matrix_lines(trace, {"trace": "trace_stderr"}, "trace, nats")
    return charts


def _spectrum_charts(table: xr.Dataset) -> dict[str, go.Figure]:
    charts: dict[str, go.Figure] = {}
    ends, negative, nodes = extremes(table), negative_curvature(table), sound_rows(table, "ritz_value")
    if ends.sizes["step"]:
        names = {"lambda_max": "lambda_max_residual", "lambda_min": "lambda_min_residual"}
        charts["gn_extremes"] = charts_of.matrix_lines(
            ends, names, "eigenvalue, nats", (GAUSS_NEWTON, HESSIAN)
        )
    if negative.sizes["step"]:
        charts["gn_negative"] = charts_of.line_chart(
            negative.sel(matrix=HESSIAN), "share", "negative share of Σ|λ|", "H's negative share",
            y_format=".1%", yaxis_tickformat=".0~%", yaxis_rangemode="tozero",
        )  # fmt: skip
    kept = evenly_spaced(nodes.sizes["step"], DENSITIES_OVER_TRAINING) if nodes.sizes["step"] else []
    found = {int(nodes["step"][i]): smoothed_density(nodes.isel(step=int(i))) for i in kept}
    known = {step: density for step, density in found.items() if density is not None}
    if known:
        charts["gn_density"] = charts_of.density_chart(list(known.values())[-1])
    if len(known) > 1:
        lines = [
            (f"step {step:,}", f"var(--series-{i})", "solid", density.sel(matrix=HESSIAN))
            for i, (step, density) in enumerate(known.items(), 1)
        ]
        charts["gn_density_training"] = charts_of.densities(lines)
    for i, block in enumerate(_density_blocks(table)):
        row = sound_rows(table, "block_ritz_value").isel(step=-1)
        density = smoothed_density(row, block)
        if density is not None:
            charts[f"gn_density-{i}"] = charts_of.density_chart(density)
    return charts


def _step_charts(table: xr.Dataset) -> dict[str, go.Figure]:
    charts: dict[str, go.Figure] = {}
    ratio, rows = curvature_ratio(table), ladder(table)
    if ratio.sizes["step"] and np.isfinite(ratio.values).any():
        charts["gn_directions"] = charts_of.ratio_chart(ratio)
    for name in LADDERS:
        along = _along(rows, name)
        if along is None:
            continue
        charts[f"gn_models-{name}"] = charts_of.models_chart(along.isel(step=-1))
        charts[f"gn_errors-{name}"] = charts_of.errors_chart(along.isel(step=-1))
        if along.sizes["step"] > 1:
            at = along.sel(alpha=full_length(rows))
            charts[f"gn_errors_training-{name}"] = charts_of.errors_over_training(at)
    return charts


def _along(rows: xr.Dataset, name: str) -> xr.Dataset | None:
    """Returns the ladder along one direction on the rows that hold it; None where none does."""
    if rows.sizes["step"] == 0 or name not in rows["ladder_direction"].values:
        return None
    along = rows.sel(ladder_direction=name)
    known = np.isfinite(along["change"].values).any((1, 2))
    return along.isel(step=np.flatnonzero(known)) if known.any() else None


def _directions(table: xr.Dataset) -> list[dict[str, Any]]:
    """Returns the last row's directions for the template: length, both curvatures and their ratio."""
    rows = measured(table, "direction_curvature", "direction_norm")
    if rows.sizes["step"] == 0:
        return []
    row, ratio = rows.isel(step=-1), curvature_ratio(table).isel(step=-1)
    return [
        {
            "name": charts_of.DIRECTION_LOOKS.get(str(name), (str(name),))[0],
            "norm": float(row["direction_norm"].sel(direction=name)),
            "of_g": float(row["direction_curvature"].sel(direction=name, matrix=GAUSS_NEWTON)),
            "of_h": float(row["direction_curvature"].sel(direction=name, matrix=HESSIAN)),
            "ratio": float(ratio.sel(direction=name)),
        }
        for name in row["direction"].values
    ]


def _ladder(table: xr.Dataset) -> list[dict[str, Any]]:
    """Returns the two errors of the last rows for the template, at the direction's own length."""
    rows = ladder(table)
    found = []
    for name, words in LADDERS.items():
        along = _along(rows, name)
        if along is None:
            continue
        row = along.sel(alpha=full_length(rows)).isel(step=-1)
        numbers = {key: float(row[key]) for key in (BEYOND, LINEARISATION, "share")}
        numbers |= {f"{key}_stderr": float(row[f"{key}_stderr"]) for key in numbers}
        found.append(
            numbers
            | {f"of_{model}": float(row["change"].sel(model=model)) for model in charts_of.MODEL_LOOKS}
            | {
                "key": name,
                "name": words,
                "step": int(row["step"]),
                "alpha": float(row["alpha"]),
                "dominant": str(row["dominant"].values),
            }
        )
    return found


def _solve(table: xr.Dataset) -> dict[str, float] | None:
    """Returns how well the last row's Gauss-Newton step was solved for."""
    rows = measured(table, "gauss_newton_step_residual", "gauss_newton_step_iterations")
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    return {
        "residual": float(row["gauss_newton_step_residual"]),
        "iterations": float(row["gauss_newton_step_iterations"]),
        "damping": float(table.attrs.get("step_damping", np.nan)),
    }


def _place(table: xr.Dataset) -> dict[str, Any] | None:
    """Returns the block that holds most of the residual's diagonal blocks at the last row, as a share with its error."""
    rows = residual_by_block(table)
    if rows.sizes["step"] == 0 or rows.sizes["block"] < 2 or not np.isfinite(rows["share"].values[-1]).any():
        return None
    row = rows.isel(step=-1)
    top = row.isel(block=int(np.nanargmax(row["share"].values)))
    return {
        "block": str(top["block"].values),
        "share": float(top["share"]),
        "stderr": float(top["share_stderr"]),
    }


def _width(table: xr.Dataset) -> float | None:
    """Returns the blur of the last row's densities."""
    rows = sound_rows(table, "ritz_value")
    density = smoothed_density(rows.isel(step=-1)) if rows.sizes["step"] else None
    return None if density is None else density.attrs["width"]


def _mass(table: xr.Dataset) -> dict[str, float] | None:
    """Returns the share of H's eigenvalues below zero at the last row, with the bounds of quadrature."""
    rows = negative_curvature(table)
    if rows.sizes["step"] == 0:
        return None
    row = rows.sel(matrix=HESSIAN).isel(step=-1)
    found = {name: float(row[name]) for name in ("mass", "mass_stderr", "mass_low", "mass_high")}
    return found if np.isfinite(found["mass"]) else None


def _density_blocks(table: xr.Dataset) -> list[str]:
    rows = sound_rows(table, "block_ritz_value")
    return [str(b) for b in rows["density_block"].values[:DENSITY_BLOCKS]] if rows.sizes["step"] else []


def _largest(table: xr.Dataset, variable: str) -> float | None:
    values = sound_rows(table, variable).get(variable, xr.DataArray([])).values
    return float(np.nanmax(values)) if values.size else None
