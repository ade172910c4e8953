"""What measuring cost a run, from every table that holds seconds, and the sentence on it."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.reading.finding import Finding
from hessprobe.reading.rows import failed_rows, sound_rows
from hessprobe.reading.wording import counted, percent


def measuring_costs(run: xr.DataTree) -> xr.Dataset:
    """Returns what each probe's rows cost (table,): rows, failed, seconds, gradient_equivalents, peak_memory.

    Seconds and gradient equivalents are sums over the rows that carry them; `seconds_per_row` and
    `gradient_equivalents_per_row` are medians; `share_of_run` is the share of all seconds, training steps and
    measuring together, that went into measuring; NaN where the run has no `train` table.
    """
    trained = sound_rows(run["train"].to_dataset(), "loss") if "train" in run.children else xr.Dataset()
    training = float(trained["seconds"][-1]) if trained.get("seconds", np.empty(0)).size else np.nan
    names = [name for name in run.children if name != "train" and "seconds" in run[name]]
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
    whole = training + np.nansum(columns["seconds"])
    columns["share_of_run"] = [seconds / whole if whole > 0 else np.nan for seconds in columns["seconds"]]
    return xr.Dataset(
        {name: ("table", np.array(column)) for name, column in columns.items()},
        coords={"table": np.array(names, dtype=object)},
    )


def _over(statistic, values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(statistic(finite)) if finite.size else np.nan


def cost_findings(run: xr.DataTree) -> list[Finding]:
    """Returns what share of a run's time went into measuring; nothing where that is not known."""
    costs = measuring_costs(run)
    share = float(costs["share_of_run"].sum(skipna=False)) if costs.sizes["table"] else np.nan
    if not np.isfinite(share):
        return []
    rows, seconds = int(costs["rows"].sum()), float(costs["seconds"].sum())
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
