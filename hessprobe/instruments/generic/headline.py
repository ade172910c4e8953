"""A row of any instrument in a few words: its first numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessprobe.instruments.instrument import STDERR
from hessprobe.instruments.row_variables import CHECK_VARIABLES, MEASUREMENT_VARIABLES
from hessprobe.schema.table import RECORDED

NUMBERS_SAID = 3
# What every instrument's rows hold: the page's section on costs and its findings on symmetry speak of them.
OF_EVERY_ROW = {variable.name for variable in (*MEASUREMENT_VARIABLES, *CHECK_VARIABLES)} | {RECORDED}


def scalars(row: Mapping[str, Any]) -> str:
    """Returns a row's first numbers by name, each with its error where it has one."""
    single = {
        name: float(value)
        for name, value in row.items()
        if getattr(value, "ndim", 0) == 0 and not isinstance(value, str | bytes)
    }
    names = [name for name in single if name not in OF_EVERY_ROW and not name.endswith(STDERR)]
    said = []
    for name in names[:NUMBERS_SAID]:
        error = f" ± {single[name + STDERR]:.2g}" if name + STDERR in single else ""
        said.append(f"{name.replace('_', ' ')} {single[name]:.4g}{error}")
    return ", ".join(said) or "recorded"
