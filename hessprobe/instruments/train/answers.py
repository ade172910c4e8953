"""What training reached and cost, from the `train` table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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


class TrainAnswers:
    """How training went.

    Args:
        table: as recorded.
        asked: the section [training] of the run's recipe, where one was recorded.
    """

    def __init__(self, table: xr.Dataset, asked: Mapping[str, Any] | None = None) -> None:
        self.table, self.asked = table, asked or {}

    @cached_property
    def summary(self) -> TrainingSummary | None:
        """As `summarize_training`."""
        return summarize_training(self.table)

    @cached_property
    def curve(self) -> xr.Dataset:
        """As `loss_curve`."""
        return loss_curve(self.table)

    def of(self, variable: str) -> xr.Dataset:
        """Returns a variable on the rows that hold it; none where the table has no such variable."""
        rows = sound_rows(self.table, variable)
        if variable not in rows:
            return xr.Dataset({variable: ("step", np.empty(0))}, {"step": np.empty(0, int)})
        return rows[[variable]].compute()

    def along(self, variable: str, clock: str = "step") -> tuple[np.ndarray, np.ndarray, None] | None:
        """Returns a loss of the curve against a clock, as places, values and no errors; None without them."""
        rows = sound_rows(self.curve, variable)
        if variable not in rows or clock not in rows.coords:
            return None
        known = np.isfinite(rows[clock].values)
        return rows[clock].values[known], rows[variable].values[known], None

    @cached_property
    def decrease_ratio(self) -> tuple[float, float, float] | None:
        """As `decrease_ratio`."""
        return decrease_ratio(self.table)

    @cached_property
    def step_outcomes(self) -> dict[str, int]:
        """As `step_outcomes`."""
        return step_outcomes(self.table)

    @property
    def planned(self) -> int | None:
        """How many steps the recipe asks for; None where it does not say."""
        steps = self.asked.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def target(self) -> float | None:
        """The held-out loss at which the run was to end early, if a recorded row reached it: the run is whole."""
        target, losses = self.asked.get("stop_at"), self.of("held_out_loss")["held_out_loss"]
        if not isinstance(target, int | float) or not losses.size:
            return None
        return float(target) if float(losses.min()) <= target else None


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


def _whole(value: float) -> int:
    return int(value) if np.isfinite(value) else 0
