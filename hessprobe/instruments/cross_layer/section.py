"""The page's section on cross-layer importance: which layers couple, how far, and what a step sees of it."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.cross_layer.answers import (
    coupling,
    coupling_by_distance,
    cross_share,
    curvature_shares,
    depths,
    off_block_energy,
)
from hessprobe.instruments.cross_layer.grouping.charts import (
    grouping_charts,
    grouping_content,
    overshoot_chart,
)
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, study_groupings
from hessprobe.pictures.charts import ACCENT, SECOND, Series, by_distance, evenly_spaced, matrix, over_steps
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.rows import failed_rows, sound_rows
from hessprobe.reading.symmetry import asymmetry
from hessprobe.reading.wording import basis

# Numbers the slider can show, all steps together: 4 bytes each, a third more as base64: about 6 MB of page.
NUMBERS_KEPT = 1_200_000
DIRECTIONS = {"update": "the update", "negative_gradient": "−gradient"}
SHOWN_DIMENSIONS = ("step", "direction", "block", "other_block")


def cross_layer(run: xr.DataTree, groupings: GroupingStudy | None = None) -> Section:
    """Returns the section on cross-layer importance, or one that says which flag records it.

    Args:
        run: an opened run.
        groupings: what `study_groupings` said of its table, where it was asked before (it takes seconds).
    """
    section = partial(
        Section, name="cross_layer", title="Cross-layer importance", template="cross_layer.html.j2"
    )
    table, reason = table_or_reason(run, "cross_layer")
    if table is None:
        return section(missing=reason)
    study = study_groupings(table) if groupings is None else groupings
    # Only what is shown: other variables (layer kernels) can be far larger than memory.
    table = table.drop_dims([dim for dim in table.dims if dim not in SHOWN_DIMENSIONS]).load()
    rows, failed = sound_rows(table, "coupling"), failed_rows(table)
    if rows.sizes["step"] == 0:
        return section(missing="No row of the table 'cross_layer' holds a number yet.", failed=failed)
    frames = _frames(rows)
    content = {
        "directions": {key: words for key, words in DIRECTIONS.items() if f"share.{key}" in frames["stacks"]},
        "blocks": rows.sizes["block"],
        "measured": rows.sizes["step"],
        "kept": len(frames["steps"]),
        "basis": basis(rows.isel(step=-1)),
        "symmetry_gap": _largest(rows, "symmetry_gap"),
        "asymmetry": asymmetry(rows),
        "has_distance": bool(np.isfinite(depths(rows["block"].values)).sum() > 1),
        "grouping": grouping_content(study),
        "jacobi_damping": float(table.attrs.get("jacobi_damping", np.nan)),
    }
    charts = _charts(table, rows) | grouping_charts(study)
    overshoot = overshoot_chart(table, run["train"].to_dataset() if "train" in run.children else None)
    if overshoot is not None:
        charts["overshoot"] = overshoot
    return section(content=content, charts=charts, frames=frames, failed=failed)


def _charts(table: xr.Dataset, rows: xr.Dataset) -> dict[str, go.Figure]:
    names, values = rows["block"].values.tolist(), rows["coupling"].values
    off_diagonal = np.where(np.eye(len(names), dtype=bool), np.nan, values)
    end, hover = _scale_end(off_diagonal), "coupling %{z:.3g} ± %{customdata:.2g}"
    charts = {
        "coupling": matrix(names, signed=False, limit=end, hover=hover, ticks=".2~g"),
        "distance": by_distance(),
    }
    energy = off_block_energy(table)
    if energy.sizes["step"]:
        charts["off_block_energy"] = _energy_chart(energy)
    shares = _shares(rows)
    if shares is not None:
        end, hover = _typical_end(np.abs(shares.values)), "%{z:.3p} of d·Gd"
        charts["shares"] = matrix(names, signed=True, limit=end, hover=hover, ticks=".0%")
        charts["cross_share"] = _share_chart(table)
    return charts


def _frames(rows: xr.Dataset) -> dict[str, Any]:
    """Returns what the slider shows: the matrices of every kept step as packed float32, means by distance."""
    blocks = [str(block) for block in rows["block"].values]
    shares = _shares(rows)
    stacks: dict[str, np.ndarray] = {str(name): part.values for name, part in coupling(rows).items()}
    if shares is not None:
        stacks |= {
            f"share.{direction}": shares.sel(direction=direction).values
            for direction in DIRECTIONS
            if direction in shares["direction"].values
        }
    most = max(1, NUMBERS_KEPT // (len(stacks) * len(blocks) ** 2))
    kept = evenly_spaced(rows.sizes["step"], most)
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


def _largest(rows: xr.Dataset, variable: str) -> float | None:
    return float(np.nanmax(rows[variable].values)) if _any(rows, variable) else None


def _scale_end(values: np.ndarray) -> float:
    """Returns the largest finite value as the colour scale's end; 1 where there is none above zero."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _typical_end(values: np.ndarray) -> float:
    """Returns the median over steps of the largest value.

    Where terms nearly cancel, one step's shares can be a hundred times another's; on a scale that reached
    them the other steps would look blank.
    """
    largest = np.where(np.isfinite(values), values, 0.0).max(axis=(-2, -1))
    return float(np.median(largest[largest > 0])) if (largest > 0).any() else 1.0


def _energy_chart(energy: xr.Dataset) -> go.Figure:
    series = Series(
        label="off-block energy",
        steps=energy["step"].values,
        values=energy["off_block_energy"].values,
        stderr=energy["off_block_energy_stderr"].values,
    )
    return over_steps([series], "off-block energy")


def _share_chart(table: xr.Dataset) -> go.Figure:
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
