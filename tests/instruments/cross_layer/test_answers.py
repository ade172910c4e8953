"""The coupling table is read as stored; what is derived from it equals a few independent lines of numpy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import (
    coupling,
    coupling_by_distance,
    cross_share,
    curvature_shares,
    off_block_energy,
    strongest_pairs,
)
from hessprobe.instruments.cross_layer import answers as module
from hessprobe.instruments.cross_layer.answers import NO_ROWS, CrossLayerAnswers, at_one_damping
from hessprobe.instruments.cross_layer.coupling import depths
from hessprobe.instruments.cross_layer.findings import MATRICES, findings
from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.cross_layer.table import cross_layer_table
from hessprobe.reading.labelled import Labelled
from tests.instruments.cross_layer.grouping.tables import table as sketched_table
from tests.instruments.cross_layer.tables import BLOCKS, table


def test_rows_that_failed_or_hold_no_number_or_are_not_recorded_are_left_out():
    log = table(rows=5)
    log["failure"].values[1] = "out of memory"
    log["coupling"].values[2] = np.nan
    log["recorded"].values[4] = False
    assert coupling(log)["step"].values.tolist() == [0, 30]
    assert off_block_energy(log)["step"].values.tolist() == [0, 20, 30]


def test_a_row_with_one_dead_layer_stays():
    log = table()
    log["coupling"].values[0, 2, :] = np.nan
    assert coupling(log).sizes["step"] == 4


def test_an_older_log_without_the_variable_has_no_rows_rather_than_an_error():
    older = table().drop_vars(["off_block_energy", "coupling"])
    assert off_block_energy(older).sizes["step"] == 0
    assert coupling_by_distance(older).sizes["step"] == 0


def test_cross_share_is_the_off_diagonal_sum_over_the_whole_sum_with_its_sign():
    curvature = table()["step_curvature"]
    curvature.values[0, 0] = np.diag([2.0, 2, 2, 2, 2]) - 0.3
    shares = cross_share(curvature)
    assert shares.dims == ("step", "direction")
    for step in range(4):
        for direction in range(2):
            matrix = curvature.values[step, direction]
            off = matrix.sum() - sum(matrix[i, i] for i in range(5))
            assert shares.values[step, direction] == pytest.approx(off / matrix.sum(), rel=1e-13)
    assert shares.values[0, 0] < 0


def test_shares_of_a_step_sum_to_one_and_a_step_of_length_zero_has_none():
    curvature = table()["step_curvature"]
    curvature.values[1, 0] = 0.0
    shares = curvature_shares(curvature)
    np.testing.assert_allclose(shares.values[0].sum(axis=(1, 2)), 1.0, rtol=1e-13)
    assert np.isnan(shares.values[1, 0]).all()
    assert np.isnan(cross_share(curvature).values[1, 0])


def test_cross_share_reads_the_axes_by_name():
    curvature = table()["step_curvature"]
    turned = curvature.transpose("other_block", "step", "block", "direction")
    xr.testing.assert_allclose(cross_share(turned).transpose("step", "direction"), cross_share(curvature))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (BLOCKS, [-1, 0, 1, 2, 3]),
        (["embedding.weight", "block.3.mlp.up", "block.10", "head"], [2, 3, 10, 11]),
        (["embedding+head", "block.0", "block.1"], [np.nan, 0, 1]),
        (["mine", "yours"], [np.nan, np.nan]),
        (["unblock.3", "block.3x", "block.1"], [np.nan, np.nan, 1]),
        (["embedding", "head"], [np.nan, np.nan]),
    ],
)
def test_depths_come_from_exact_name_components(blocks, expected):
    np.testing.assert_array_equal(depths(np.array(blocks, dtype=object)), expected)


def test_coupling_by_distance_averages_the_pairs_that_far_apart():
    log = table()
    result = coupling_by_distance(log)
    assert result["distance"].values.tolist() == [1, 2, 3, 4]
    assert result["pairs"].values.tolist() == [4, 3, 2, 1]
    for step in range(4):
        for distance in range(1, 5):
            values = np.diagonal(log["coupling"].values[step], offset=distance)
            errors = np.diagonal(log["coupling_stderr"].values[step], offset=distance)
            row = result.isel(step=step).sel(distance=distance)
            assert float(row["coupling"]) == pytest.approx(values.mean(), rel=1e-13)
            assert float(row["coupling_stderr"]) == pytest.approx(errors.mean(), rel=1e-13)


def test_blocks_without_a_depth_stand_at_no_distance():
    assert coupling_by_distance(table(blocks=["a", "b", "c"])).sizes["distance"] == 0


def test_strongest_pairs_are_in_order_and_skip_dead_layers():
    row = coupling(table()).isel(step=-1)
    row["coupling"].values[0, :] = row["coupling"].values[:, 0] = np.nan
    pairs = strongest_pairs(row, count=3)
    every = [
        (row["coupling"].values[i, j], BLOCKS[i], BLOCKS[j]) for i in range(1, 5) for j in range(i + 1, 5)
    ]
    expected = sorted(every, reverse=True)[:3]
    found = zip(pairs["coupling"].values, pairs["block"].values, pairs["other_block"].values, strict=True)
    assert list(found) == expected


def test_what_the_readers_name_is_declared():
    """Every variable and dimension that the reading side takes from a table by name stands in the table's declaration."""
    declared: set[str] = {"step", "step_size"}  # the last is of the table `train`
    for recipe in (CrossLayerRecipe(), CrossLayerRecipe(method="products")):
        layout = cross_layer_table(recipe, tuple(BLOCKS))
        declared |= {*layout.coordinates, *layout.attributes}
        declared |= {variable.name for variable in layout.variables}
    named: set[str] = set()
    for name in ("coupling", "answers", "grouping/sketches"):
        text = (Path(module.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        named |= set(re.findall(r'(?:sound_rows\([\w.]+, |attrs\.get\(|rows\[|row\[|dim=)"(\w+)"', text))
    assert {"coupling", "jacobi_radius", "step_curvature", "kernel", "jacobi_damping"} <= named
    assert named <= declared | {"coupling_stderr"}, named - declared
    assert set(MATRICES) == set(get_args(CrossLayerRecipe.model_fields["matrix"].annotation))


def test_answers_are_asked_once_and_survive_a_table_of_nothing():
    answers = CrossLayerAnswers(table())
    assert answers.coupling is answers.coupling and answers.groupings is answers.groupings
    nothing = CrossLayerAnswers(NO_ROWS)
    assert findings(nothing) == [] and nothing.strongest_pairs is None and nothing.cross_share is None
    assert nothing.by_distance.sizes["step"] == nothing.jacobi_radius.sizes["step"] == 0


def test_groupings_of_several_runs_are_judged_at_the_largest_of_their_dampings():
    one, other = (CrossLayerAnswers(sketched_table(1).assign(coupling=("step", [1.0]))) for _ in range(2))
    other = other.at_damping(2 * one.groupings.damping)
    assert other.groupings.damping == 2 * one.groupings.damping
    nothing = CrossLayerAnswers(NO_ROWS)
    runs = [
        Labelled(label=str(i), answers=each, compared=each) for i, each in enumerate((one, other, nothing))
    ]
    first, second, third = (run.compared for run in at_one_damping(runs))
    assert first.groupings.damping == second.groupings.damping == other.groupings.damping
    assert second is other and third is nothing and third.groupings.reason
