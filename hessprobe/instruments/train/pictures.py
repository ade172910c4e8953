"""The pictures of training: losses against steps and other clocks, step sizes, promised and real decrease."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.instruments.train.clocks import CLOCKS
from hessprobe.pictures.looks import Look, by_position
from hessprobe.pictures.over_runs import Series, lines_of_runs
from hessprobe.pictures.picture import Axis, Line, Lines, Picture
from hessprobe.reading.labelled import Labelled

Run = Labelled[TrainAnswers]
NATS = "nats per token"
SECOND = Look(color="second")
ON_PAPER = ("tokens", "seconds")  # clocks with a figure of their own


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Returns all pictures of training, of one run or several."""
    if len(runs) > 1:
        return [held_out_losses(runs), step_sizes(runs)]
    of_loss: list[Picture] = [losses(runs[0]), *(losses(runs[0], clock) for clock in ON_PAPER)]
    # Steps without a loss are no training to speak of.
    return of_loss if runs[0].answers.summary is None else [*of_loss, step_sizes(runs), decreases(runs[0])]


def losses(run: Run, clock: str = "step") -> Lines:
    """Returns training and held-out loss against one of CLOCKS; against steps, the page exchanges the clocks itself."""
    curve = run.answers.curve
    name = "loss" if clock == "step" else f"loss_by_{clock}"
    if clock != "step":
        curve = curve.dropna("step", subset=[clock]) if clock in curve.coords else curve.isel(step=[])
    missing = f"no row of the table 'train' holds {'a loss' if clock == 'step' else clock}; nothing to draw"
    lines = []
    for variable, label, look in (
        ("loss", "training loss", SECOND),
        ("held_out_loss", "held-out loss", Look()),
    ):
        known = curve.dropna("step", subset=[variable]) if variable in curve else curve.isel(step=[])
        if known.sizes["step"]:
            x, y = known[clock].values, known[variable].values
            lines.append(Line(label=label, x=x, y=y, look=look, markers=variable != "loss"))
    return Lines(
        name=name,
        where="both" if clock == "step" else "paper",
        lines=lines,
        x=Axis(words=CLOCKS[clock][1]),
        y=Axis(words="loss", units=NATS),
        data=curve,
        missing=missing,
    )


def held_out_losses(runs: Sequence[Run]) -> Lines:
    """Returns the held-out loss of several runs."""
    return Lines(
        name="loss",
        lines=lines_of_runs(runs, lambda run: _series(run, "held_out_loss"), "held-out loss"),
        y=Axis(words="held-out loss", units=NATS),
        legend=True,
        missing="no row of the table 'train' holds a held_out_loss; nothing to draw",
    )


def step_sizes(runs: Sequence[Run]) -> Lines:
    """Returns the step sizes that line searches chose, 0 where they rejected every one."""
    lines = [
        Line(
            label="step size" if len(runs) == 1 else run.label,
            x=series[0],
            y=series[1],
            look=Look() if len(runs) == 1 else by_position(i),
            # They jump between a few choices: a line between those of one run would say nothing.
            dots=len(runs) == 1,
        )
        for i, run in enumerate(runs)
        if (series := _series(run, "step_size")) is not None
    ]
    return Lines(
        name="step_size",
        lines=lines,
        y=Axis(words="step size", from_zero=len(runs) == 1),
        legend=len(runs) > 1,
        data=runs[0].answers.rows("step_size") if len(runs) == 1 else None,
        missing="no row of the table 'train' holds a step_size; nothing to draw",
    )


def decreases(run: Run) -> Lines:
    """Returns the decrease that the model of the loss promised, and the real one."""
    series = [_series(run, variable) for variable in ("actual_decrease", "predicted_decrease")]
    real, promised = series
    missing = "no row of the table 'train' holds a predicted_decrease; nothing to draw"
    if real is None or promised is None:
        return Lines(name="decrease", missing=missing)
    dotted = Look(color="second", dash="dot", paper_dash="dash")
    return Lines(
        name="decrease",
        lines=[
            Line(label="real", x=real[0], y=real[1]),
            Line(label="predicted by the model", x=promised[0], y=promised[1], look=dotted),
        ],
        y=Axis(words="decrease", units=NATS),
        data=run.answers.rows("predicted_decrease"),
        missing=missing,
    )


def _series(run: Run, variable: str) -> Series | None:
    rows = run.answers.rows(variable)
    if rows is None:
        return None
    return np.asarray(rows["step"].values), rows[variable].values.astype(float), None
