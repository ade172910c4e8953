"""The pictures of training: what page and paper draw is what is stored, along the clock that is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.instruments.train.pictures import Run, decreases, losses, pictures, step_sizes
from hessprobe.pictures import matplotlib_pen, plotly_pen
from hessprobe.reading.labelled import Labelled


def run_of(table: xr.Dataset, label: str = "") -> Run:
    answers = TrainAnswers(table)
    return Labelled(label=label, answers=answers, compared=answers)


def test_losses_steps_and_decreases_are_what_is_stored(log: xr.DataTree):
    table = log["train"].to_dataset().load()
    run = run_of(table)
    real, promised = decreases(run).lines
    np.testing.assert_array_equal(real.y, table["actual_decrease"])
    np.testing.assert_array_equal(promised.y, table["predicted_decrease"])
    training, held_out = losses(run).lines
    np.testing.assert_array_equal(training.y, table["loss"])
    np.testing.assert_array_equal(held_out.y, table["held_out_loss"].dropna("step"))
    (sizes,) = step_sizes([run]).lines
    np.testing.assert_array_equal(sizes.y, table["step_size"])
    assert [each.name for each in pictures([run])] == [
        "loss",
        "loss_by_tokens",
        "loss_by_seconds",
        "step_size",
        "decrease",
    ]
    assert set(plotly_pen.charts(pictures([run]))) == {"loss", "step_size", "decrease"}


@pytest.mark.parametrize("clock", ["tokens", "seconds", "gradient_equivalents"])
def test_the_loss_lies_along_the_clock_that_is_asked_for(log: xr.DataTree, clock):
    table = log["train"].to_dataset().load()
    training, held_out = losses(run_of(table), clock).lines
    np.testing.assert_array_equal(training.x, table[clock])
    evaluated = table.dropna("step", subset=["held_out_loss"])
    np.testing.assert_array_equal(held_out.x, evaluated[clock])
    np.testing.assert_array_equal(held_out.y, evaluated["held_out_loss"])
    with pytest.raises(UserError, match=f"holds {clock}"):
        matplotlib_pen.draw(losses(run_of(table.drop_vars(clock)), clock))


def test_several_runs_have_a_line_each_and_one_without_rows_keeps_the_others_looks(log: xr.DataTree):
    table = log["train"].to_dataset().load()
    runs = [run_of(table.isel(step=[]), "empty"), run_of(table, "first"), run_of(table, "second")]
    for picture in pictures(runs):
        assert [line.label for line in picture.lines] == ["first", "second"]  # type: ignore[attr-defined]
        assert picture.lines[0].look.color == "series-2"  # type: ignore[attr-defined]


def test_rows_without_a_loss_are_no_training(log: xr.DataTree):
    table = log["train"].to_dataset().load()
    table["loss"][:] = np.nan
    assert plotly_pen.charts(pictures([run_of(table)])) == {}
