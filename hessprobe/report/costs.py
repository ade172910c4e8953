"""What measuring cost: the page's section on it, of one run or several, and its finding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.registry import OURS
from hessprobe.pictures import plotly_pen
from hessprobe.pictures.looks import Look
from hessprobe.pictures.picture import Axis, Line, Lines
from hessprobe.pictures.section import PageSection, table_or_reason
from hessprobe.reading.costs import measuring_costs
from hessprobe.reading.finding import Finding
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.wording import counted, percent

_LOOKS = (Look(), Look(color="second"), Look(color="negative"))


def costs(run: xr.DataTree) -> PageSection:
    """Returns the section on the costs of measuring."""
    table = measuring_costs(run)
    missing = (
        ""
        if table.sizes["table"]
        else table_or_reason(run, OURS[0])[1] or "No table of this run holds costs."
    )
    return PageSection(
        name="costs",
        title="Costs of measuring",
        template="costs.html.j2",
        missing=missing,
        content={"rows": _rows(table), "share": _share(table)},
        charts=plotly_pen.charts([_seconds(run, table)]),
    )


def several_costs(labels: Sequence[str], runs: Sequence[xr.DataTree]) -> PageSection:
    """Returns the section on the costs of measuring of several runs."""
    rows = [
        {"run": label} | row
        for label, run in zip(labels, runs, strict=True)
        for row in _rows(measuring_costs(run))
    ]
    return PageSection(
        name="costs",
        title="Costs of measuring",
        template="several_costs.html.j2",
        missing="" if rows else "No table of these runs holds costs.",
        content={"rows": rows},
    )


def cost_findings(run: xr.DataTree) -> list[Finding]:
    """Returns the finding on the share of measuring in a run's time; none where that is not known."""
    table = measuring_costs(run)
    share = _share(table)
    if share is None or not table.sizes["table"]:
        return []
    rows, seconds = int(table["rows"].sum()), float(table["seconds"].sum())
    return [
        Finding(
            name="measuring_cost",
            sentence=f"Measuring took {percent(share)} of the time of training and measuring: "
            f"{seconds:,.1f} s for {counted(rows, 'row')}.",
            value=share,
            stderr=None,
            basis="wall clock",
            steps=(),
            headline=percent(share),
            label="of the time of training and measuring was measuring",
        )
    ]


def _share(table: xr.Dataset) -> float | None:
    share = float(table["share_of_run"].sum(skipna=False))
    return share if np.isfinite(share) else None


def _rows(table: xr.Dataset) -> list[dict[str, Any]]:
    return [
        {"table": str(name), **{str(key): float(column.values[i]) for key, column in table.items()}}
        for i, name in enumerate(table["table"].values)
    ]


def _seconds(run: xr.DataTree, table: xr.Dataset) -> Lines:
    rows = [(str(name), sound_rows(run[str(name)].to_dataset(), "seconds")) for name in table["table"].values]
    lines = [
        Line(label=name, x=each["step"].values, y=each["seconds"].values.astype(float), look=look)
        for (name, each), look in zip(rows, cycle(_LOOKS), strict=False)
        if each.sizes["step"]
    ]
    return Lines(name="seconds", where="page", lines=lines, y=Axis(words="seconds per row", from_zero=True))
