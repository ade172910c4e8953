"""Where training stands, recomputed from the stored columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import loss_curve, open_run, summarize_training
from hessprobe.instruments.train.answers import decrease_ratio, step_outcomes
from tests.report.runs import write_run


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    folder: Path = tmp_path_factory.mktemp("runs") / "run"
    return open_run(
        write_run(folder, train_steps=13, steps=[0, 4, 8, 12], failed={4: "no memory"}, blank=[8])
    )


def test_the_summary_is_the_last_row_and_the_best_held_out_loss(log):
    table = log["train"].to_dataset().load()
    summary = summarize_training(table)
    assert summary is not None
    held_out = table["held_out_loss"].values
    assert summary.best_held_out_loss == np.nanmin(held_out) == held_out[summary.best_step]
    assert (summary.first_held_out_loss, summary.last_held_out_loss) == (held_out[0], held_out[10])
    assert (summary.steps, summary.last_step) == (13, 12)
    assert summary.last_loss == table["loss"].values[-1]
    assert summary.tokens == 13 * 8192 and summary.line_search_tokens == 13 * 4096
    assert summary.seconds == 32.5 and summary.gradient_equivalents == 390.0


def test_a_run_that_evaluates_nothing_has_no_best_loss(log):
    table = log["train"].to_dataset().load()
    table["held_out_loss"][:] = np.nan
    summary = summarize_training(table)
    assert summary is not None and summary.best_step is None and np.isnan(summary.best_held_out_loss)
    summary = summarize_training(table.drop_vars("held_out_loss"))
    assert summary is not None and summary.best_step is None
    assert summarize_training(table.isel(step=[])) is None


def test_a_step_whose_loss_is_nan_is_no_part_of_the_curve(log):
    table = log["train"].to_dataset().load()
    table["loss"][5] = np.nan
    assert 5 not in loss_curve(table)["step"].values
    assert set(loss_curve(table).coords) >= {"tokens", "seconds", "gradient_equivalents"}
    assert loss_curve(table).swap_dims(step="tokens")["loss"].dims == ("tokens",)


def test_the_decrease_ratio_is_over_the_steps_that_promised_one(log):
    table = log["train"].to_dataset().load()
    table["predicted_decrease"][:3] = [np.nan, 0.0, -1.0]
    table["actual_decrease"][3] = np.nan
    real, promised = table["actual_decrease"].values[4:], table["predicted_decrease"].values[4:]
    assert decrease_ratio(table) == pytest.approx(tuple(np.quantile(real / promised, (0.25, 0.5, 0.75))))
    assert decrease_ratio(table.isel(step=slice(7))) is None  # three steps are no distribution
    assert decrease_ratio(table.drop_vars("actual_decrease")) is None
    assert decrease_ratio(table.drop_vars("predicted_decrease")) is None


def test_outcomes_are_counted_by_their_first_word():
    said = [
        "accepted",
        "rejected: no step size lowers the loss",
        "accepted",
        "retried: twice",
        "",
        "accepted",
    ]
    table = xr.Dataset({"outcome": ("step", np.array(said, dtype=object))}, {"step": range(6)})
    assert step_outcomes(table) == {"accepted": 3, "rejected": 1, "retried": 1}
    assert step_outcomes(table.drop_vars("outcome")) == {}
