"""The page's section on cross-layer importance: which layers couple, how far, and what a step sees of it."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.analysis import coupling_by_distance, cross_share, curvature_shares, off_block_energy
from hessprobe.analysis.coupling import depths
from hessprobe.analysis.rows import failed_rows, sound_rows
from hessprobe.analysis.wording import basis
from hessprobe.report.charts import ACCENT, SECOND, Series, by_distance, matrix, over_steps
from hessprobe.report.section import Section, table_or_reason

# Numbers the slider can show, all steps together: 4 bytes each, a third more as base64, so about 6 MB of page.
NUMBERS_KEPT = 1_200_000
DIRECTIONS = {"update": "the update", "negative_gradient": "−gradient"}
MATRIX_HOVER = "%{z:.3g} ± %{customdata:.2g}"


def cross_layer(run: xr.DataTree) -> Section:
    """Returns the section on cross-layer importance, or one that says which flag records it."""
    table, reason = table_or_reason(run, "cross_layer")
    name = {"name": "cross_layer", "title": "Cross-layer importance", "template": "cross_layer.html.j2"}
    if table is None:
        return Section(**name, missing=reason)
    table = table.load()
    rows = sound_rows(table, "coupling")
    if rows.sizes["step"] == 0:
        return Section(**name, missing="No row of the table 'cross_layer' holds a number yet.", failed=failed_rows(table))
    frames = _frames(rows)
    off_diagonal = _without_diagonal(rows["coupling"].values)
    charts = {
        "coupling": matrix(
            rows["block"].values, signed=False, limit=_scale_end(off_diagonal), hover=f"coupling {MATRIX_HOVER}",
            legend="coupling", ticks=".2~g",
        ),
        "distance": by_distance(),
    }  # fmt: skip
    if "off_block_energy" in table:
        charts["off_block_energy"] = _energy_chart(table)
    shares = _shares(rows)
    if shares is not None:
        charts["shares"] = matrix(
            rows["block"].values, signed=True, limit=_scale_end(np.abs(shares.values)),
            hover="%{z:.3p} of d·Gd", legend="share of d·Gd", ticks=".0%",
        )  # fmt: skip
        charts["cross_share"] = _share_chart(table)
    last = rows.isel(step=-1)
    gap = float(np.nanmax(rows["symmetry_gap"].values)) if _any(rows, "symmetry_gap") else None
    content = {
        "directions": {key: words for key, words in DIRECTIONS.items() if f"share.{key}" in frames["stacks"]},
        "measured": rows.sizes["step"],
        "kept": len(frames["steps"]),
        "basis": basis(last),
        "symmetry_gap": gap,
        "has_distance": bool(np.isfinite(depths(rows["block"].values)).sum() > 1),
    }
    return Section(**name, content=content, charts=charts, frames=frames, failed=failed_rows(table))


def _frames(rows: xr.Dataset) -> dict[str, Any]:
    """Returns what the slider shows: each matrix of every kept step as packed float32, and the pairs' distances."""
    blocks = [str(block) for block in rows["block"].values]
    shares = _shares(rows)
    stacks: dict[str, np.ndarray] = {
        "coupling": rows["coupling"].values,
        "coupling_stderr": rows["coupling_stderr"].values,
    }
    if shares is not None:
        stacks |= {
            f"share.{direction}": shares.sel(direction=direction).values
            for direction in DIRECTIONS
            if direction in shares["direction"].values
        }
    most = max(1, NUMBERS_KEPT // (len(stacks) * len(blocks) ** 2))
    total = rows.sizes["step"]
    kept = np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(int)) if most > 1 else [total - 1]
    where = depths(rows["block"].values)
    means = coupling_by_distance(rows.isel(step=kept))
    return {
        "steps": rows["step"].values[kept].tolist(),
        "blocks": blocks,
        "depths": [int(depth) if np.isfinite(depth) else None for depth in where],
        "stacks": {name: _packed(stack[kept]) for name, stack in stacks.items()},
        "distances": means["distance"].values.tolist(),
        "means": {name: _packed(means[name].values) for name in ("coupling", "coupling_stderr")},
    }


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def _shares(rows: xr.Dataset) -> xr.DataArray | None:
    if not _any(rows, "step_curvature"):
        return None
    return curvature_shares(rows["step_curvature"]).transpose("step", "direction", "block", "other_block")


def _any(rows: xr.Dataset, variable: str) -> bool:
    return variable in rows and bool(np.isfinite(rows[variable].values).any())


def _without_diagonal(stack: np.ndarray) -> np.ndarray:
    return np.where(np.eye(stack.shape[-1], dtype=bool), np.nan, stack)


def _scale_end(values: np.ndarray) -> float:
    """Returns the largest finite value as the colour scale's end; 1 where there is none above zero."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _energy_chart(table: xr.Dataset):
    energy = off_block_energy(table)
    series = Series(
        label="off-block energy",
        steps=energy["step"].values,
        values=energy["off_block_energy"].values,
        stderr=energy["off_block_energy_stderr"].values,
    )
    return over_steps([series], "off-block energy")


def _share_chart(table: xr.Dataset):
    rows = sound_rows(table, "step_curvature")
    shares = cross_share(rows["step_curvature"])
    looks = {"update": (ACCENT, "solid"), "negative_gradient": (SECOND, "dot")}
    series = [
        Series(
            label=f"along {words}",
            steps=rows["step"].values,
            values=shares.sel(direction=direction).values,
            color=looks[direction][0],
            dash=looks[direction][1],
        )
        for direction, words in DIRECTIONS.items()
        if direction in shares["direction"].values
    ]
    return over_steps(series, "cross share", y_format=".1%", yaxis_tickformat=".0%")
