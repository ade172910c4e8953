"""What measuring cost, from every table of a log."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from hessprobe.reading.rows import failed_rows, sound_rows

TRAINING = "train"  # the table whose rows are steps, not measurements


def measuring_costs(run: xr.DataTree) -> xr.Dataset:
    """Returns what each probe's rows cost (table,): rows, failed, seconds, gradient_equivalents, peak_memory.

    Seconds and gradient equivalents are sums over the rows that carry them; `seconds_per_row` and
    `gradient_equivalents_per_row` are medians; `share_of_run` is the share of all seconds, training steps and
    measuring together, that went into measuring; NaN where the run has no `train` table.
    """
    names = [name for name in run.children if name != TRAINING and "seconds" in run[name]]
    tables = [run[name].to_dataset() for name in names]
    columns: dict[str, list[float]] = {
        "rows": [table.sizes["step"] for table in tables],
        "failed": [len(failed_rows(table)) for table in tables],
    }
    for quantity in ("seconds", "gradient_equivalents", "peak_memory"):
        values = [sound_rows(table, quantity).get(quantity, xr.DataArray([])).values for table in tables]
        if quantity == "peak_memory":
            columns[quantity] = [_over(np.max, value) for value in values]
            continue
        columns[quantity] = [_over(np.sum, value) for value in values]
        columns[f"{quantity}_per_row"] = [_over(np.median, value) for value in values]
    whole = _seconds_trained(run) + np.nansum(columns["seconds"])
    columns["share_of_run"] = [seconds / whole if whole > 0 else np.nan for seconds in columns["seconds"]]
    return xr.Dataset(
        {name: ("table", np.array(column)) for name, column in columns.items()},
        coords={"table": np.array(names, dtype=object)},
    )


def _seconds_trained(run: xr.DataTree) -> float:
    """Returns the seconds of training steps so far; NaN where they are not known."""
    rows = sound_rows(run[TRAINING].to_dataset(), "loss") if TRAINING in run.children else xr.Dataset()
    return float(rows["seconds"].values[-1]) if "seconds" in rows and rows.sizes["step"] else np.nan


def _over(statistic: Callable[..., float], values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(statistic(finite)) if finite.size else np.nan
