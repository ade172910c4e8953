"""What measuring cost, recomputed from the stored columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import measuring_costs, open_run
from hessprobe.report.costs import cost_findings
from tests.report.runs import write_run


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    folder: Path = tmp_path_factory.mktemp("runs") / "run"
    return open_run(
        write_run(folder, train_steps=13, steps=[0, 4, 8, 12], failed={4: "no memory"}, blank=[8])
    )


def test_costs_are_the_sums_over_the_rows_that_were_measured(log):
    costs = measuring_costs(log).sel(table="cross_layer")
    table = log["cross_layer"].to_dataset().load()
    seconds = table["seconds"].values[[0, 3]]
    assert (int(costs["rows"]), int(costs["failed"])) == (4, 1)
    assert float(costs["seconds"]) == pytest.approx(seconds.sum(), rel=1e-13)
    assert float(costs["seconds_per_row"]) == pytest.approx(np.median(seconds), rel=1e-13)
    assert float(costs["gradient_equivalents"]) == 128.0
    assert float(costs["share_of_run"]) == pytest.approx(seconds.sum() / (32.5 + seconds.sum()), rel=1e-13)


def test_without_training_there_is_no_share(tmp_path):
    log = open_run(write_run(tmp_path / "run", train_steps=0))
    assert np.isnan(measuring_costs(log)["share_of_run"].values).all()
    assert measuring_costs(open_run(write_run(tmp_path / "other", steps=None))).sizes["table"] == 0
    assert cost_findings(log) == []


def test_the_finding_states_the_share_of_all_tables(log):
    (found,) = cost_findings(log)
    assert found.value == float(measuring_costs(log)["share_of_run"].sum())
    assert "for 4 rows" in found.sentence and found.headline in found.sentence
