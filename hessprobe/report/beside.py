"""Runs as functions of tables take them beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.trend import standard_errors_of_largest


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """One of several runs.

    Attributes:
        label: what it is called, of no other run.
        tree: the opened run, whole.
        table: its `cross_layer` rows up to the step at which runs are compared; None where it has none.
        groupings: of that table, at the damping that serves all runs.
    """

    label: str
    tree: xr.DataTree
    table: xr.Dataset | None
    groupings: GroupingStudy


def coupling_difference(first: Beside, second: Beside) -> xr.Dataset | None:
    """Returns the second run's coupling minus the first's at their last rows (block, other_block), with its error.

    NaN where a pair lies within its errors: as many as make noise among all pairs as rare as two do for one. None for
    runs of different blocks, or without rows.
    """
    rows = []
    for run in (first, second):
        table = None if run.table is None else sound_rows(run.table, "coupling")
        if table is None or table.sizes["step"] == 0 or "coupling_stderr" not in table:
            return None
        rows.append(table[["coupling", "coupling_stderr"]].isel(step=-1).load())
    if list(rows[0]["block"].values) != list(rows[1]["block"].values):
        return None
    size = rows[1]["coupling"] - rows[0]["coupling"]
    stderr = np.hypot(rows[0]["coupling_stderr"], rows[1]["coupling_stderr"])
    size, stderr = (each.drop_vars("step", errors="ignore") for each in (size, stderr))
    layers = size.sizes["block"]
    enough = standard_errors_of_largest(layers * (layers - 1) // 2)
    return xr.Dataset({"difference": size.where(abs(size) > enough * stderr), "stderr": stderr})
