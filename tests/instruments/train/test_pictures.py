"""Training's pictures: the stored losses against each clock, on the page as on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import open_run
from hessprobe.errors import UserError
from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.instruments.train.pictures import CLOCKS, loss, pictures
from hessprobe.instruments.train.section import content
from hessprobe.instruments.train.table import train_table
from hessprobe.pictures import matplotlib_pen, plotly_pen
from hessprobe.reading.clocks import CLOCKS as COUNTED
from hessprobe.reading.labelled import Labelled
from tests.pictures.drawn import lines_on_page, lines_on_paper
from tests.report.runs import write_run


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    folder: Path = tmp_path_factory.mktemp("runs") / "run"
    return open_run(write_run(folder, steps=None))["train"].to_dataset().load()


def runs(*tables: xr.Dataset) -> list[Labelled[TrainAnswers]]:
    found = [TrainAnswers(table) for table in tables]
    return [Labelled(label=f"run {i}", answers=each, compared=each) for i, each in enumerate(found)]


def test_page_and_paper_draw_what_is_stored(table):
    drawn = {each.name: each for each in pictures(runs(table))}
    assert list(drawn) == ["loss", "step_size", "loss_by_tokens", "loss_by_seconds", "decrease"]
    expected = {
        "loss": (table["loss"], table["held_out_loss"].dropna("step")),
        "step_size": (table["step_size"],),
        "decrease": (table["actual_decrease"], table["predicted_decrease"]),
    }
    for name, stored in expected.items():
        page = lines_on_page(plotly_pen.draw(drawn[name]))
        for lines in (page, lines_on_paper(matplotlib_pen.draw(drawn[name]))):
            for line, values in zip(lines, stored, strict=True):
                np.testing.assert_array_equal(line["x"], values["step"])
                np.testing.assert_array_equal(line["y"], values)


@pytest.mark.parametrize("clock", ["tokens", "seconds", "gradient_equivalents"])
def test_the_loss_lies_along_the_clock_that_is_asked_for(table, clock):
    training, held_out = lines_on_paper(matplotlib_pen.draw(loss(runs(table), clock)))
    np.testing.assert_array_equal(training["x"], table[clock])
    evaluated = table.dropna("step", subset=["held_out_loss"])
    np.testing.assert_array_equal(held_out["x"], evaluated[clock])
    np.testing.assert_array_equal(held_out["y"], evaluated["held_out_loss"])
    with pytest.raises(UserError, match=f"holds {clock}"):
        matplotlib_pen.draw(loss(runs(table.drop_vars(clock)), clock))
    with pytest.raises(UserError, match="no clock named 'token'"):
        loss(runs(table), "token")


def test_several_runs_show_their_held_out_losses_and_keep_their_colours(table):
    bare = table.isel(step=[])
    found = content(runs(bare, table))
    assert [label for label, _ in found["rows"]] == ["run 1"] and set(found["frames"]) == set(CLOCKS)
    (line,) = loss(runs(bare, table)).lines
    assert line.label == "run 1" and line.look.color == "series-2"
    assert content(runs(bare)) == {}


def test_everything_that_is_read_is_declared():
    declared = {variable.name for variable in train_table([1.0], 1).variables}
    read = {"loss", "held_out_loss", "outcome", "step_size", "predicted_decrease", "actual_decrease"}
    assert {*read, *COUNTED, *CLOCKS} - {"step"} <= declared
