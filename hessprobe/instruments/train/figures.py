"""Figures on training for a paper: loss against each clock, the step sizes taken, promised and real decrease.

Each function returns the figure and the data drawn in it.
"""

from __future__ import annotations

import matplotlib
import xarray as xr
from matplotlib.figure import Figure

from hessprobe.errors import UserError, unknown_name
from hessprobe.instruments.train.answers import loss_curve as curve_of
from hessprobe.pictures.paper import ACCENT, COLUMN, SECOND, STYLE, marker, new, stored
from hessprobe.reading.rows import sound_rows

CLOCKS = {
    "step": "step",
    "tokens": "tokens",
    "seconds": "seconds of training steps",
    "gradient_equivalents": "gradients of a minibatch",
}


def loss_curve(run: xr.DataTree, clock: str = "step") -> tuple[Figure, xr.Dataset]:
    """Returns training and held-out loss against one of CLOCKS, drawn, and the curve drawn.

    Raises:
        UserError: no such clock, no table, or nothing to draw.
    """
    if clock not in CLOCKS:
        raise unknown_name("clock", clock, CLOCKS)
    curve = curve_of(stored(run, "train"))
    if clock != "step":
        curve = curve.dropna("step", subset=[clock]) if clock in curve.coords else curve.isel(step=[])
    if curve.sizes["step"] == 0:
        raise UserError("no row of the table 'train' holds a loss; nothing to draw" if clock == "step" else
                        f"no row of the table 'train' holds {clock}; nothing to draw")  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        axes.plot(curve[clock], curve["loss"], color="#999999", label="training")
        if "held_out_loss" in curve:
            held_out = curve["held_out_loss"].dropna("step")
            axes.plot(held_out[clock], held_out, color=ACCENT, marker=marker(held_out.size), label="held out")
        axes.set_xlabel(CLOCKS[clock])
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
    return figure, curve


def step_size_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the step sizes that the line search chose, 0 where it rejected every one, drawn, and those rows."""
    rows = sound_rows(stored(run, "train"), "step_size")
    if rows.sizes["step"] == 0:
        raise UserError("no row of the table 'train' holds a step_size; nothing to draw")
    drawn = rows[["step_size"]].compute()
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        # They jump between a few choices: a line between them would say nothing.
        size = 3.5 if drawn.sizes["step"] <= 60 else 1.5
        axes.plot(drawn["step"], drawn["step_size"], "o", color=ACCENT, markersize=size)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("step size")
    return figure, drawn


def decrease_over_training(run: xr.DataTree) -> tuple[Figure, xr.Dataset]:
    """Returns the decrease that the model promised and the real one by step, drawn, and those numbers."""
    rows = sound_rows(stored(run, "train"), "predicted_decrease")
    if rows.sizes["step"] == 0 or "actual_decrease" not in rows:
        raise UserError("no row of the table 'train' holds a predicted_decrease; nothing to draw")
    drawn = rows[["actual_decrease", "predicted_decrease"]].compute()
    with matplotlib.rc_context(STYLE):
        figure, axes = new(COLUMN * 0.62)
        axes.plot(drawn["step"], drawn["actual_decrease"], color=ACCENT, label="real")
        axes.plot(drawn["step"], drawn["predicted_decrease"], "--", color=SECOND, label="predicted")
        axes.set_xlabel("step")
        axes.set_ylabel("decrease (nats per token)")
        axes.legend()
    return figure, drawn
