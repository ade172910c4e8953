"""What training reached and cost, from the table `train`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from hessprobe.reading.clocks import CLOCKS
from hessprobe.reading.rows import sound_rows


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


class TrainAnswers:
    """The answers of one table `train`.

    Args:
        table: as recorded.
    """

    def __init__(self, table: xr.Dataset) -> None:
        self.table = table

    @cached_property
    def curve(self) -> xr.Dataset:
        """Losses over steps, as `loss_curve`."""
        return loss_curve(self.table)

    @cached_property
    def summary(self) -> TrainingSummary | None:
        """Where the run stands, as `summarize_training`."""
        return summarize_training(self.table)

    @cached_property
    def ratio(self) -> tuple[float, float, float] | None:
        """Real over predicted decrease, as `decrease_ratio`."""
        return decrease_ratio(self.table)

    @cached_property
    def outcomes(self) -> dict[str, int]:
        """What became of the steps, as `step_outcomes`."""
        return step_outcomes(self.table)

    def rows(self, variable: str) -> xr.Dataset | None:
        """Returns the rows in which a variable was measured; None where there is none."""
        rows = sound_rows(self.table, variable)
        return rows if rows.sizes["step"] else None


def _whole(value: float) -> int:
    return int(value) if np.isfinite(value) else 0
