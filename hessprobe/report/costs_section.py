"""The page's section on what measuring cost, of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.pictures import plotly_pen
from hessprobe.pictures.looks import Look
from hessprobe.pictures.picture import Axis, Line, Lines
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.rows import sound_rows
from hessprobe.report.costs import measuring_costs

LOOKS = tuple(Look(color=color) for color in ("accent", "second", "negative"))


def costs(run: xr.DataTree) -> Section:
    """Returns the section on the costs of measuring."""
    section = partial(Section, name="costs", title="Costs of measuring", template="costs.html.j2")
    rows = _rows(run)
    if not rows:
        reason = table_or_reason(run, "cross_layer")[1] or "No table of this run holds costs."
        return section(missing=reason)
    share = sum(row["share_of_run"] for row in rows)
    return section(
        content={"rows": rows, "share": share if np.isfinite(share) else None},
        charts=plotly_pen.charts([seconds(run, [row["table"] for row in rows])]),
    )


def several_costs(runs: Sequence[tuple[str, xr.DataTree]]) -> Section:
    """Returns the section on the costs of measuring of several labelled runs."""
    rows = [{"run": label, **row} for label, run in runs for row in _rows(run)]
    return Section(
        name="costs", title="Costs of measuring", template="several_costs.html.j2", content={"rows": rows},
        missing="" if rows else "No table of these runs holds costs.",
    )  # fmt: skip


def seconds(run: xr.DataTree, tables: Sequence[str]) -> Lines:
    """Returns what each measured row took, a line for each table."""
    lines = []
    for i, name in enumerate(tables):
        rows = sound_rows(run[name].to_dataset(), "seconds")
        values = rows["seconds"].values.astype(float)
        lines.append(Line(label=name, x=rows["step"].values, y=values, look=LOOKS[i % len(LOOKS)]))
    return Lines(name="seconds", lines=lines, y=Axis(words="seconds per row", from_zero=True), where="page")


def _rows(run: xr.DataTree) -> list[dict[str, Any]]:
    """Returns a table's costs, one entry for each table."""
    found = measuring_costs(run)
    return [
        {"table": str(name), **{str(key): float(column.values[i]) for key, column in found.items()}}
        for i, name in enumerate(found["table"].values)
    ]
