"""Which rows of a table carry numbers: recorded, not failed, and finite in the variable that is asked for."""

from __future__ import annotations

import numpy as np
import xarray as xr


def sound_rows(table: xr.Dataset, variable: str) -> xr.Dataset:
    """Returns the rows in which `variable` was measured: recorded, without a failure, and not NaN throughout.

    A variable the table does not hold has no sound rows: an older log gives an empty selection, not an error.
    """
    if variable not in table:
        return table.isel(step=slice(0, 0))
    values = table[variable]
    finite = (abs(values) < np.inf).any([dim for dim in values.dims if dim != "step"])
    keep = finite.values & (failures(table) == "")
    if "recorded" in table:
        keep &= table["recorded"].values.astype(bool)
    return table.isel(step=np.flatnonzero(keep))


def failures(table: xr.Dataset) -> np.ndarray:
    """Returns each row's reason of failure, (step,) strings; empty where the row is fine."""
    if "failure" not in table:
        return np.full(table.sizes["step"], "", dtype=object)
    return np.array([str(reason or "") for reason in table["failure"].values], dtype=object)


def failed_rows(table: xr.Dataset) -> dict[int, str]:
    """Returns {step: reason} of the rows whose measurement failed, in order of step."""
    return {
        int(step): reason
        for step, reason in zip(table["step"].values, failures(table), strict=True)
        if reason
    }
