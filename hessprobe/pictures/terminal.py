"""Rows of a table as aligned lines in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from rich.markup import escape
from rich.table import Table

ROWS_OF_AN_END = 6


def first_and_last(table: xr.Dataset, columns: Sequence[str]) -> Table:
    """Returns the first and last rows of a table's scalar columns."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", *columns):
        shown.add_column(escape(column), justify="right")
    count = table.sizes["step"]
    whole = count <= 2 * ROWS_OF_AN_END
    ends = np.r_[np.arange(ROWS_OF_AN_END), np.arange(count - ROWS_OF_AN_END, count)]
    rows = table[list(columns)].isel(step=np.arange(count) if whole else ends).compute()
    for i in range(rows.sizes["step"]):
        if i == ROWS_OF_AN_END and not whole:
            shown.add_row(*["…"] * (len(columns) + 1))
        cells = [_cell(rows[column].values[i]) for column in columns]
        shown.add_row(str(int(rows["step"].values[i])), *cells)
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return escape(value)
    number = float(value)
    if not np.isfinite(number):
        return "-"
    return f"{int(number):,}" if number.is_integer() and abs(number) >= 100 else f"{number:.4g}"
