"""Every number of the table `cross_layer` is the dense truth's: exact ones to rounding, estimates by z-score."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from hessprobe.probes.cross_layer import DIRECTIONS, CrossLayerProbe
from hessprobe.probes.probe import Row, Snapshot
from hessprobe.recipe import CrossLayerRecipe
from tests import oracles
from tests.cases import Case

SAMPLES, SEEDS = 16, 24
EXACT = ("decoder", "decoder_ragged", "decoder_tied", "decoder_swiglu_layernorm", "mlp_regression")


def snapshot_of(case: Case, seed: int = 0) -> Snapshot:
    return Snapshot(
        step=3,
        objective=case.objective,
        partition=case.partition,
        parameters=case.partition.vector(case.problem.model),
        batches=list(case.problem.batches),
        update=0.1 * case.rows(1, seed=9)[0],
        seed=seed,
    )


def probe(samples: int = 2) -> CrossLayerProbe:
    return CrossLayerProbe(CrossLayerRecipe(sequences=2, samples=samples))


def along(case: Case, direction: Tensor) -> Tensor:
    """Returns d_i . G_ij d_j for all pairs of blocks, dense."""
    g = case.truth.gauss_newton
    rows = [[direction[i] @ g[i, j] @ direction[j] for j in case.slices] for i in case.slices]
    return torch.stack([torch.stack(row) for row in rows])


def blockwise(case: Case, products: Tensor) -> Tensor:
    return torch.stack([products[where].sum() for where in case.slices])


@pytest.mark.parametrize("name", EXACT)
def test_curvature_and_slope_along_both_directions_are_exact(name, zoo_case):
    case = zoo_case(name)
    snapshot = snapshot_of(case)
    row = probe().measure(snapshot)
    update, gradient = snapshot.update, case.truth.gradient
    assert update is not None
    for i, direction in enumerate((update, -gradient)):
        assert oracles.relative_error(row["step_curvature"][i], along(case, direction)) < 1e-9
        slope = blockwise(case, gradient * direction)
        assert oracles.relative_error(row["step_slope"][i], slope) < 1e-9
        # The blocks make up the whole: d.Gd and g.d.
        whole = direction @ case.truth.gauss_newton @ direction
        assert float(row["step_curvature"][i].sum()) == pytest.approx(float(whole), rel=1e-9)
    assert oracles.relative_error(row["gradient_norm2"], blockwise(case, gradient.square())) < 1e-9
    assert float(row["loss"]) == pytest.approx(float(case.truth.loss), rel=1e-12)
    assert row["tokens"] == case.truth.tokens
    assert DIRECTIONS == ("update", "negative_gradient")


@cache
def measured() -> tuple[Case, list[Row]]:
    """Returns a case and its rows at many seeds."""
    case = Case.of("decoder_tied")
    return case, [probe(SAMPLES).measure(snapshot_of(case, seed)) for seed in range(SEEDS)]


def off_block_energy(case: Case) -> Tensor:
    fro2 = oracles.block_fro2(case.truth.gauss_newton, case.slices)
    return 1 - fro2.diagonal().sum() / fro2.sum()


TRUTHS = {
    "fro2": lambda case: oracles.block_fro2(case.truth.gauss_newton, case.slices),
    "coupling": lambda case: oracles.coupling(case.truth.gauss_newton, case.slices),
    "off_block_energy": off_block_energy,
}


@pytest.mark.parametrize("name", TRUTHS)
def test_estimates_are_unbiased(name):
    case, rows = measured()
    found, wanted = torch.stack([row[name] for row in rows]), TRUTHS[name](case)
    error, stderr = found.mean(0) - wanted, found.std(0) / SEEDS**0.5
    exact = stderr < 1e-12  # coupling of a block with itself
    assert bool((error[exact].abs() < 1e-9).all())
    z = (error / stderr)[~exact]
    assert z.numel() and float(z.abs().max()) < 3.5


@pytest.mark.parametrize("name", TRUTHS)
def test_standard_errors_are_the_spread_over_seeds(name):
    _, rows = measured()
    spread = torch.stack([row[name] for row in rows]).std(0)
    claimed = torch.stack([row[f"{name}_stderr"] for row in rows]).square().mean(0).sqrt()
    varies = spread > 1e-12
    ratio = (claimed / spread)[varies]
    # A spread over 24 seeds is itself known to 15 %; kurtosis widens that.
    assert float(ratio.min()) > 0.6 and float(ratio.max()) < 1.7
    assert bool((claimed[~varies] < 1e-12).all())


def test_a_block_couples_with_itself_fully_and_pairs_are_symmetric():
    _, rows = measured()
    for row in rows[:5]:
        assert torch.equal(row["fro2"], row["fro2"].mT)
        torch.testing.assert_close(row["coupling"].diagonal(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", EXACT)
def test_the_symmetry_gap_is_rounding(name, zoo_case):
    assert probe().measure(snapshot_of(zoo_case(name)))["symmetry_gap"] < 1e-12


@pytest.mark.parametrize("name", ["decoder", "mlp_regression"])
def test_the_row_is_what_the_table_declares(name, zoo_case):
    case = zoo_case(name)
    instrument = probe()
    table, row = instrument.table(case.partition), instrument.measure(snapshot_of(case))
    # The recorder alone knows these two.
    assert {v.name for v in table.variables} == set(row) | {"seconds", "peak_memory"}
    for variable in table.variables:
        if variable.name in row:
            assert np.shape(row[variable.name]) == table.row_shape(variable), variable.name
    assert tuple(table.coordinates["block"]) == case.partition.blocks
    assert table.name == instrument.name == "cross_layer"
    assert row["gradient_equivalents"] == instrument.cost(case.partition)


def test_a_row_depends_on_seed_and_step_alone(zoo_case):
    snapshot = snapshot_of(zoo_case("mlp_regression"))
    row, again = probe().measure(snapshot), probe().measure(snapshot)
    other = [probe().measure(replace(snapshot, seed=1)), probe().measure(replace(snapshot, step=4))]
    assert torch.equal(row["fro2"], again["fro2"])
    assert not any(torch.equal(row["fro2"], different["fro2"]) for different in other)


def test_it_measures_at_the_snapshots_parameters_though_the_model_has_moved_on(zoo_case):
    case = copy.deepcopy(zoo_case("decoder_ragged"))
    snapshot = snapshot_of(case)
    before = probe().measure(snapshot)
    case.partition.assign(case.problem.model, snapshot.parameters + 1)
    after = probe().measure(snapshot)
    for name in ("fro2", "step_curvature", "step_slope", "gradient_norm2", "loss"):
        assert torch.equal(before[name], after[name]), name


def test_without_an_update_that_direction_is_not_a_number_and_the_other_is(zoo_case):
    row = probe().measure(replace(snapshot_of(zoo_case("mlp_regression")), update=None))
    for name in ("step_curvature", "step_slope"):
        assert torch.isnan(row[name][0]).all()
        assert torch.isfinite(row[name][1]).all()
