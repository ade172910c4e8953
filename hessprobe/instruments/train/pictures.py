"""The pictures of training: losses against each of a run's clocks, the step sizes taken, promised and real decrease."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hessprobe.errors import unknown_name
from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.pictures.looks import Look
from hessprobe.pictures.over_runs import Series, lines_of_runs
from hessprobe.pictures.picture import Axis, Line, Lines, Picture
from hessprobe.reading.labelled import Labelled

Runs = Sequence[Labelled[TrainAnswers]]

# Clock -> what lies along it.
CLOCKS = {
    "step": "step",
    "tokens": "tokens read to take steps",
    "seconds": "seconds of training steps",
    "gradient_equivalents": "gradients of a minibatch",
}
SECOND = Look(color="second")


def pictures(runs: Runs) -> list[Picture]:
    """Returns all pictures of one run, or those that show several beside each other."""
    shared: list[Picture] = [loss(runs), step_size(runs)]
    if len(runs) != 1:
        return shared
    on_paper = [replace(loss(runs, clock), where="paper") for clock in ("tokens", "seconds")]
    return [*shared, *on_paper, decrease(runs[0].answers)]


def loss(runs: Runs, clock: str = "step") -> Lines:
    """Returns training and held-out loss of one run, or the held-out losses of several, against one of CLOCKS."""
    if clock not in CLOCKS:
        raise unknown_name("clock", clock, CLOCKS)
    alone = len(runs) == 1
    trained = lines_of_runs(runs, lambda run: run.answers.along("loss", clock), "training loss", SECOND)
    held_out = lines_of_runs(runs, lambda run: run.answers.along("held_out_loss", clock), "held-out loss")
    return Lines(
        name="loss" if clock == "step" else f"loss_by_{clock}",
        lines=[replace(line, markers=False) for line in trained if alone] + held_out,
        x=Axis(words=CLOCKS[clock]),
        y=Axis(words="loss" if alone else "held-out loss", units="nats per token"),
        legend=None if alone else True,
        missing=_none("a loss" if clock == "step" else clock),
        data=runs[0].answers.curve if alone else None,
    )


def step_size(runs: Runs) -> Lines:
    """Returns the step sizes that the line search chose, 0 where it rejected every one, over training."""
    lines = lines_of_runs(runs, lambda run: _over_steps(run.answers, "step_size"), "step size")
    return Lines(
        name="step_size",
        # They jump between a few choices: a line between them would say nothing.
        lines=[replace(line, dots=True) for line in lines],
        y=Axis(words="step size", from_zero=True),
        legend=True if len(runs) > 1 else None,
        missing=_none("a step_size"),
    )


def decrease(answers: TrainAnswers) -> Lines:
    """Returns the decrease of the loss that the model promised and the real one, by step; nothing without both."""
    looks = {
        "actual_decrease": ("real", Look()),
        "predicted_decrease": ("predicted by the model", Look(color="second", dash="dot", paper_dash="dash")),
    }
    found = {name: _over_steps(answers, name) for name in looks}
    both = all(y.size for _, y, _ in found.values())
    return Lines(
        name="decrease",
        lines=[
            Line(label=label, x=found[name][0], y=found[name][1], look=look)
            for name, (label, look) in looks.items()
            if both
        ],
        y=Axis(words="decrease", units="nats per token"),
        missing=_none("a predicted_decrease"),
    )


def _over_steps(answers: TrainAnswers, variable: str) -> Series:
    rows = answers.of(variable)
    return rows["step"].values, rows[variable].values.astype(float), None


def _none(what: str) -> str:
    return f"no row of the table 'train' holds {what}; nothing to draw"
