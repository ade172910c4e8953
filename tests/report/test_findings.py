"""Findings claim what lies beyond two errors, say where something does not, and state the stored numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import Finding, findings, jacobi_radius, open_run
from tests.instruments.cross_layer.tables import BLOCKS, table
from tests.report.runs import write_run


def said(log: xr.Dataset) -> dict[str, Finding]:
    measured = log.assign(sequences=("step", np.full(log.sizes["step"], 16.0)))
    return {finding.name: finding for finding in findings(xr.DataTree.from_dict({"/cross_layer": measured}))}


def changed(rows: int = 4, **variables: Any) -> xr.Dataset:
    log = table(rows=rows)
    for name, values in variables.items():
        log[name][:] = values
    return log


def test_a_share_within_two_errors_is_said_to_be_unresolved():
    clear = said(changed(off_block_energy=0.3, off_block_energy_stderr=0.1))["off_block_energy"]
    unclear = said(changed(off_block_energy=0.3, off_block_energy_stderr=0.2))["off_block_energy"]
    assert clear.resolved and "30 ± 10 %" in clear.sentence and clear.basis == "16 sequences"
    assert not unclear.resolved and "not resolved from zero" in unclear.sentence
    assert clear.steps == (30,)


def test_how_far_a_layerwise_step_overshoots_stands_between_its_two_estimates():
    assert "jacobi_radius" not in said(table())
    log = table().assign(
        jacobi_radius=("step", [3.0, 3.1, np.nan, 2.5]), jacobi_radius_held_out=("step", [2.0, 2.2, 2.0, 2.6])
    )
    finding = said(log.assign_attrs(jacobi_damping=0.1))["jacobi_radius"]
    # Noise put the low estimate above the high one: they are stated in order.
    assert (
        "overshoots 2.5 to 2.6 times" in finding.sentence
        and "5 the most that 5 layers can" in finding.sentence
    )
    assert "beyond 0.77 to 0.8 of its own length" in finding.sentence
    assert finding.steps == (30,) and finding.value == 2.5 and finding.stderr is None
    assert finding.basis == "16 sequences, damping 0.1; one estimate rather low, one rather high"
    rows = jacobi_radius(log)
    assert rows["step"].values.tolist() == [0, 10, 30] and rows["high"].values.tolist() == [3.0, 3.1, 2.6]
    # An older log has no estimate from held-out sequences.
    assert jacobi_radius(log.drop_vars("jacobi_radius_held_out"))["low"].values.tolist() == [3.0, 3.1, 2.5]


def test_the_strongest_of_ten_pairs_must_lie_beyond_what_the_largest_of_noise_reaches():
    values = np.full((4, 5, 5), 0.0)
    values[:, 1, 2] = values[:, 2, 1] = 0.25
    unclear = said(changed(coupling=values, coupling_stderr=0.1))[
        "strongest_pair"
    ]  # 2.5 errors; 2.8 are needed
    assert not unclear.resolved and "no pair of layers has a coupling resolved from zero" in unclear.sentence


def test_trends_need_four_rows_and_two_errors():
    rising = changed(off_block_energy=[0.1, 0.2, 0.3, 0.4], off_block_energy_stderr=0.01)
    trend = said(rising)["off_block_energy_trend"]
    assert trend.basis == "straight line through 4 measured steps; 16 sequences each"
    assert said(rising)["cross_share_trend"].basis == trend.basis
    assert trend.resolved and "rises by 30.0 ± 1.3 percentage points from step 0 to 30" in trend.sentence
    assert "off_block_energy_trend" not in said(rising.isel(step=slice(3)))
    noisy = said(changed(off_block_energy=[0.1, 0.2, 0.3, 0.4], off_block_energy_stderr=0.2))
    assert not noisy["off_block_energy_trend"].resolved
    assert "no resolved trend" in noisy["off_block_energy_trend"].sentence


def test_the_cross_share_says_what_a_block_diagonal_model_sees():
    curvature = np.full((4, 2, 5, 5), 0.1) + 0.5 * np.eye(5)
    share = 1 - 5 * 0.6 / (5 * 0.6 + 20 * 0.1)
    finding = said(changed(step_curvature=curvature))["cross_share_update"]
    assert finding.value == pytest.approx(share, rel=1e-12) and finding.stderr is None
    assert "40.0 % of the curvature" in finding.sentence and "sees 60.0 %" in finding.sentence
    assert finding.basis == "exact on 16 sequences"
    cancelling = np.full((4, 2, 5, 5), -0.1) + 0.7 * np.eye(5)
    finding = said(changed(step_curvature=cancelling))["cross_share_update"]
    assert (
        finding.value < 0
        and "layers cancel" in finding.sentence
        and "sees 3 times the curvature" in finding.sentence
    )


def test_a_step_of_length_zero_has_no_cross_share():
    assert "cross_share_update" not in said(changed(step_curvature=0.0))


def test_pairs_that_cannot_be_told_apart_are_not_ranked():
    values = np.full((4, 5, 5), 0.2)
    values[:, 1, 2] = values[:, 2, 1] = 0.5
    values[:, 3, 4] = values[:, 4, 3] = 0.48
    close = said(changed(coupling=values, coupling_stderr=0.02))["strongest_pair"]
    assert "2 pairs of layers couple most strongly and cannot be told apart" in close.sentence
    apart = said(changed(coupling=values, coupling_stderr=0.002))["strongest_pair"]
    assert f"{BLOCKS[1]} and {BLOCKS[2]}" in apart.sentence and "0.5000 ± 0.0020" in apart.sentence
    lost = said(changed(coupling=values, coupling_stderr=0.4))["strongest_pair"]
    assert not lost.resolved and "no pair" in lost.sentence


@pytest.mark.parametrize(
    ("sign", "verdict"), [(1, "falls with"), (-1, "grows with"), (0, "does not resolvably")]
)
def test_coupling_against_distance(sign, verdict):
    distance = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    finding = said(changed(coupling=0.5 - 0.1 * sign * distance, coupling_stderr=0.02))[
        "coupling_by_distance"
    ]
    assert f"coupling {verdict}" in finding.sentence and finding.resolved == (sign != 0)
    assert finding.value == pytest.approx(0.3 * sign) and finding.stderr == pytest.approx(0.04)


def test_nothing_recorded_means_nothing_found(tmp_path):
    assert findings(xr.DataTree()) == []
    assert findings(xr.DataTree.from_dict({"/cross_layer": table().isel(step=[])})) == []
    failed = table()
    failed["failure"][:] = "no memory"
    assert findings(xr.DataTree.from_dict({"/cross_layer": failed})) == []
    assert findings(open_run(write_run(tmp_path / "run", train_steps=0, steps=[]))) == []


def test_a_loss_that_did_not_fall_is_said_so(tmp_path):
    log = open_run(write_run(tmp_path / "run", steps=None, train_steps=6))
    train = log["train"].to_dataset().load()
    train["held_out_loss"][:] = [2.0, np.nan, 2.5, np.nan, np.nan, 3.0]
    finding = findings(xr.DataTree.from_dict({"/train": train}))[0]
    assert not finding.resolved and "has not fallen below its first value, 2 nats" in finding.sentence
