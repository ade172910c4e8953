"""Several runs' Hessians beside their Gauss-Newton matrices: gaps, negative curvature, steps, and densities of H."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from hessprobe.instruments.gn_hessian.answers import HESSIAN, curvature_ratio, gn_gap
from hessprobe.instruments.gn_hessian.charts import densities
from hessprobe.instruments.gn_hessian.ladder import full_length, ladder
from hessprobe.instruments.gn_hessian.spectrum import negative_curvature, smoothed_density
from hessprobe.pictures.charts import over_steps
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.pictures.several import Ask, Line, lines_over_steps, looks
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.wording import basis
from hessprobe.report.beside import Beside

PERCENT = {"y_format": ".1%", "yaxis_tickformat": ".0~%"}


def several_gn_hessian(beside: Sequence[Beside]) -> Section:
    """Returns the section on Gauss-Newton against Hessian of several runs, or one that says which flag records it."""
    missing = [
        f"{run.label}: {reason}" for run in beside if (reason := table_or_reason(run.tree, "gn_hessian")[1])
    ]
    section = partial(
        Section,
        name="gn_hessian",
        title="Gauss-Newton against Hessian",
        template="several_gn_hessian.html.j2",
    )
    charts = _charts(beside)
    if not charts:
        return section(missing=" ".join(missing) or "No measured row holds a number yet.")
    said = [
        f"{run.label}: {basis(table.isel(step=-1), exact=True) or 'basis not recorded'}"
        for run in beside
        if (table := _table(run)) is not None and table.sizes["step"]
    ]
    return section(charts=charts, content={"missing": missing, "said": said})


def _charts(beside: Sequence[Beside]) -> dict[str, go.Figure]:
    charts: dict[str, go.Figure] = {}
    lines: dict[str, tuple[Ask, str, dict[str, Any]]] = {
        "gn_gap": (_gap, "‖H − G‖ / ‖G‖", {"yaxis_rangemode": "tozero"}),
        "gn_cosine": (_cosine, "cosine of H and G", {}),
        "gn_negative": (_negative, "negative share of Σ|λ|", {**PERCENT, "yaxis_rangemode": "tozero"}),
        "gn_update": (_update, "d·Hd / d·Gd along the update", {}),
        "gn_linearisation": (_share, "linearising, of both errors", PERCENT),
    }
    for name, (ask, title, options) in lines.items():
        series = lines_over_steps(beside, ask)
        if series:
            charts[name] = over_steps(series, title, **options).update_layout(showlegend=True)
    found = [
        (run.label, look["color"], look["dash"], density)
        for run, look in looks(beside)
        if (density := _density(run)) is not None
    ]
    if found:
        charts["gn_density"] = densities(found)
    return charts


def _table(run: Beside) -> xr.Dataset | None:
    return run.tree["gn_hessian"].to_dataset() if "gn_hessian" in run.tree.children else None


def _gap(run: Beside) -> Line | None:
    table = _table(run)
    if table is None:
        return None
    rows = gn_gap(table)
    return rows["step"].values, rows["gn_gap"].values, rows["gn_gap_stderr"].values


def _cosine(run: Beside) -> Line | None:
    table = _table(run)
    if table is None:
        return None
    rows = gn_gap(table)
    return rows["step"].values, rows["cosine"].values, rows["cosine_stderr"].values


def _negative(run: Beside) -> Line | None:
    table = _table(run)
    rows = None if table is None else negative_curvature(table)
    if rows is None or rows.sizes["step"] == 0:
        return None
    of_h = rows.sel(matrix=HESSIAN)
    return of_h["step"].values, of_h["share"].values, of_h["share_stderr"].values


def _update(run: Beside) -> Line | None:
    table = _table(run)
    ratio = None if table is None else curvature_ratio(table)
    if ratio is None or "update" not in ratio["direction"].values:
        return None
    return _known(ratio["step"].values, ratio.sel(direction="update").values, None)


def _share(run: Beside) -> Line | None:
    """Returns the linearisation's share of the two errors along the update, at its full length."""
    table = _table(run)
    rows = None if table is None else ladder(table)
    if rows is None or rows.sizes["step"] == 0 or "update" not in rows["ladder_direction"].values:
        return None
    along = rows.sel(ladder_direction="update", alpha=full_length(rows))
    return _known(along["step"].values, along["share"].values, along["share_stderr"].values)


def _known(steps: np.ndarray, values: np.ndarray, stderr: np.ndarray | None) -> Line:
    keep = np.flatnonzero(np.isfinite(values))
    return steps[keep], values[keep], None if stderr is None else stderr[keep]


def _density(run: Beside) -> xr.Dataset | None:
    table = _table(run)
    rows = None if table is None else sound_rows(table, "ritz_value")
    if rows is None or rows.sizes["step"] == 0:
        return None
    found = smoothed_density(rows.isel(step=-1).load())
    return None if found is None else found.sel(matrix=HESSIAN)
