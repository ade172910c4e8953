"""What training reached and cost, from the `train` table; what measuring cost, from every table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import xarray as xr

from hessprobe.reading.rows import failed_rows, sound_rows

CLOCKS = ("tokens", "line_search_tokens", "seconds", "probe_seconds", "gradient_equivalents")


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """Where a run stands at its last recorded step. Losses in nats per token; NaN where not evaluated."""

    steps: int
    last_step: int
    first_loss: float
    last_loss: float
    first_held_out_loss: float
    first_held_out_step: int | None
    last_held_out_loss: float
    best_held_out_loss: float
    best_step: int | None
    tokens: int
    line_search_tokens: int
    seconds: float
    probe_seconds: float
    gradient_equivalents: float


def loss_curve(table: xr.Dataset) -> xr.Dataset:
    """Returns `loss` and `held_out_loss` (step) with the run's clocks as coordinates.

    Clocks: tokens, seconds, gradient equivalents. `curve.swap_dims(step="tokens")` puts another one under it.
    """
    rows = sound_rows(table, "loss")
    present = [name for name in (*CLOCKS, "loss", "held_out_loss") if name in rows]
    rows = rows[present].compute()
    return rows.set_coords([name for name in CLOCKS if name in present])


def summarize_training(table: xr.Dataset) -> TrainingSummary | None:
    """Returns the summary of the rows recorded so far; None where no row carries a loss."""
    curve = loss_curve(table)
    if curve.sizes["step"] == 0:
        return None
    loss = curve["loss"].values
    held_out = curve["held_out_loss"].dropna("step") if "held_out_loss" in curve else curve["loss"][:0]
    best = held_out.isel(step=int(held_out.values.argmin())) if held_out.size else None
    last = {name: float(curve[name].values[-1]) if name in curve.coords else np.nan for name in CLOCKS}
    return TrainingSummary(
        steps=loss.size,
        last_step=int(curve["step"].values[-1]),
        first_loss=float(loss[0]),
        last_loss=float(loss[-1]),
        first_held_out_loss=float(held_out.values[0]) if best is not None else np.nan,
        first_held_out_step=int(held_out["step"].values[0]) if best is not None else None,
        last_held_out_loss=float(held_out.values[-1]) if best is not None else np.nan,
        best_held_out_loss=float(best) if best is not None else np.nan,
        best_step=int(best["step"]) if best is not None else None,
        tokens=_whole(last["tokens"]),
        line_search_tokens=_whole(last["line_search_tokens"]),
        seconds=last["seconds"],
        probe_seconds=last["probe_seconds"],
        gradient_equivalents=last["gradient_equivalents"],
    )


def decrease_ratio(table: xr.Dataset) -> tuple[float, float, float] | None:
    """Returns the quartiles of real over predicted decrease over the steps that promised one, the median second.

    None where fewer than 4 steps did. 1 where the model of the loss is right; steps that were rejected count as 0.
    """
    rows = sound_rows(table, "predicted_decrease")
    if not {"actual_decrease", "predicted_decrease"} <= set(rows.data_vars):
        return None
    promised, real = rows["predicted_decrease"].values, rows["actual_decrease"].values
    told = np.isfinite(promised) & np.isfinite(real) & (promised > 0)
    if told.sum() < 4:
        return None
    low, median, high = np.quantile(real[told] / promised[told], (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def step_outcomes(table: xr.Dataset) -> dict[str, int]:
    """Returns {outcome: steps} of what became of the recorded steps, by the outcome's first word, in order of count."""
    if "outcome" not in table:
        return {}
    words = [str(outcome).partition(":")[0].strip() for outcome in table["outcome"].values]
    return dict(Counter(word for word in words if word).most_common())


def measuring_costs(run: xr.DataTree) -> xr.Dataset:
    """Returns what each probe's rows cost (table,): rows, failed, seconds, gradient_equivalents, peak_memory.

    Seconds and gradient equivalents are sums over the rows that carry them; `seconds_per_row` and
    `gradient_equivalents_per_row` are medians; `share_of_run` is the share of all seconds, training steps and
    measuring together, that went into measuring; NaN where the run has no `train` table.
    """
    summary = summarize_training(run["train"].to_dataset()) if "train" in run.children else None
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
    whole = (summary.seconds if summary else np.nan) + np.nansum(columns["seconds"])
    columns["share_of_run"] = [seconds / whole if whole > 0 else np.nan for seconds in columns["seconds"]]
    return xr.Dataset(
        {name: ("table", np.array(column)) for name, column in columns.items()},
        coords={"table": np.array(names, dtype=object)},
    )


def _over(statistic, values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(statistic(finite)) if finite.size else np.nan


def _whole(value: float) -> int:
    return int(value) if np.isfinite(value) else 0
