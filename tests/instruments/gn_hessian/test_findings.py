"""Findings on G against H state the stored numbers, claim what lies beyond its errors, and say what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import Finding, open_run
from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.findings import findings as gn_hessian_findings
from hessprobe.instruments.gn_hessian.findings import trends
from hessprobe.report.findings import findings
from tests.instruments.gn_hessian.runs import Truth, write_gn_run


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Truth]]:
    return write_gn_run(tmp_path_factory.mktemp("gn") / "run")


@pytest.fixture
def table(written) -> xr.Dataset:
    return open_run(written[0])["gn_hessian"].to_dataset().load()


def said(table: xr.Dataset) -> dict[str, Finding]:
    found = {each.name: each for each in gn_hessian_findings(GNHessianAnswers(table))}
    assert all("nan" not in each.sentence.lower() and "inf" not in each.sentence for each in found.values())
    return found


def changed(table: xr.Dataset, step: int = 30, **values) -> xr.Dataset:
    for name, value in values.items():
        table[name].loc[{"step": step}] = value
    return table


def test_the_gap_stands_with_its_error_share_cosine_and_probes(table, written):
    g, h, r = written[1][30].matrices
    gap = np.linalg.norm(r) / np.linalg.norm(g)
    finding = said(table)["gn_gap"]
    assert finding.value == pytest.approx(gap) and finding.stderr == pytest.approx(0.05 * gap)
    assert f"lies {gap:.4f} ± {0.05 * gap:.4f} times" in finding.sentence and finding.resolved
    cosine = (g * h).sum() / np.linalg.norm(g) / np.linalg.norm(h)
    assert f"cosine of H and G is {cosine:.3f}" in finding.sentence
    assert finding.basis == "32 sequences, 2,048 tokens, 8 probes" and finding.steps == (30,)
    # Eight probes: an error of seven degrees of freedom takes 2.36 of it, not 2.
    unclear = said(changed(table, gn_gap_stderr=gap / 2.2))["gn_gap"]
    assert not unclear.resolved and "not resolved from zero" in unclear.sentence


def test_a_block_stands_out_only_beyond_what_two_probes_a_block_can_tell(table):
    gaps = np.array([0.1, 0.2, 0.9, 0.15, 0.1, 0.0])
    clear = said(changed(table, block_gn_gap=gaps, block_gn_gap_stderr=0.05 * gaps))["gn_block_gap"]
    assert clear.resolved and "is block.1 (0.900 ± 0.045 of its norm)" in clear.sentence
    assert clear.value == 0.9 and "2 probes a block" in clear.basis
    unclear = said(changed(table, block_gn_gap_stderr=0.4 * gaps))["gn_block_gap"]
    assert not unclear.resolved and "blocks of 6 share the largest distance" in unclear.sentence
    # One block's tiny error from two probes is luck: the others' relative errors say what it is worth.
    lucky = said(changed(table, block_gn_gap_stderr=np.where(gaps == 0.9, 1e-6, 0.4 * gaps)))["gn_block_gap"]
    assert lucky.stderr == pytest.approx(0.9 * np.sqrt(4 * 0.4**2 / 5), rel=1e-3)


def test_the_residuals_trace_has_a_sign_only_beyond_its_error(table):
    g = float(table["trace"].sel(step=30, matrix="gauss_newton"))
    trace = np.array([g, g - 3.0, -3.0])
    finding = said(changed(table, trace=trace, trace_stderr=[0.1, 0.2, 0.2]))["residual_trace"]
    assert (
        "takes 3.00 ± 0.20 from the trace" in finding.sentence and finding.value == -3.0 and finding.resolved
    )
    finding = said(changed(table, trace_stderr=[0.1, 2.0, 2.0]))["residual_trace"]
    assert not finding.resolved and "(−3.0 ± 2.0) is not resolved from zero" in finding.sentence


def test_a_negative_ritz_value_proves_negative_curvature(table, written):
    smallest, largest = np.linalg.eigvalsh(written[1][30].matrices[1])[[0, -1]]
    finding = said(table)["negative_eigenvalue"]
    assert finding.value == pytest.approx(smallest) and finding.stderr is None and finding.resolved
    assert f"{abs(smallest) / largest:.2g} times the size of the largest ({largest:.4g})" in finding.sentence
    assert "24 Lanczos steps from 3 random starts" in finding.basis
    none = said(changed(table, lambda_min=[1e-3, 1e-4, -0.1]))["negative_eigenvalue"]
    assert not none.resolved and "no negative eigenvalue of the Hessian was met" in none.sentence


def test_the_negative_share_needs_two_starts_and_says_where_they_differ(table):
    finding = said(table)["negative_share"]
    assert 0 < finding.value < 1 and finding.stderr is not None
    assert finding.resolved == (finding.value > 4.3027 * finding.stderr)
    assert "negative_share" not in said(table.isel(probe=[0]))


def test_curvature_along_the_update_and_where_the_hessian_curves_down(table, written):
    known = written[1][30]
    (g, h, _), d = known.matrices, known.directions
    ratio = (d[1] @ h @ d[1]) / (d[1] @ g @ d[1])
    finding = said(table)["update_curvature"]
    assert finding.value == pytest.approx(ratio) and finding.stderr is None and len(finding.steps) == 6
    assert (
        f"has {ratio:.4g} times" in finding.sentence.replace("−", "-")
        and "over 6 measured steps" in finding.sentence
    )
    curvature = table["direction_curvature"].sel(step=30).values.copy()
    curvature[1] = [0.1, -0.2, 0.3, 4.0, -0.5]
    down = said(changed(table, direction_curvature=curvature))["update_curvature"]
    assert "The Hessian curves down along the update and a random direction." in down.sentence
    # Steps of no length have no ratio; the last that has one speaks.
    table["direction_curvature"].loc[{"step": 30, "direction": "update"}] = np.nan
    assert said(table)["update_curvature"].steps[-1] == 24
    table["direction_curvature"].loc[{"direction": "update"}] = np.nan
    assert "update_curvature" not in said(table)


def test_which_error_of_the_model_dominates_with_signs_and_shares(table):
    found = said(table)
    finding = found["model_error_update"]
    row = table.sel(step=30, ladder_direction="update", alpha=1.0)
    assert finding.value == pytest.approx(0.6) and finding.resolved and finding.headline.startswith("60.0 ±")
    assert (
        "linearising the network makes up 60.0 ± 2.4 % of the two, and they partly cancel" in finding.sentence
    )
    assert "leaves out −0.0300 ± 0.0015, the loss's higher orders add 0.0200 ± 0.0010" in finding.sentence
    assert f"{float(row['change'].sel(model='loss')):.4g}".replace("-", "−") in finding.sentence
    assert finding.label == "of the model's error along the update is linearising the network"
    step = found["model_error_gauss_newton_step"]
    assert "damping 0.1, residual 0.009 after 15 iterations" in step.basis and step.headline == ""
    table["linearisation_stderr"].loc[{"step": 30}] = 0.01
    finding = said(table)["model_error_update"]
    assert (
        not finding.resolved
        and finding.headline == ""
        and "which is larger is not resolved" in finding.sentence
    )
    table["linearisation"].loc[{"step": 30}] = -0.002
    table["linearisation_stderr"].loc[{"step": 30}] = 0.0001
    finding = said(table)["model_error_update"]
    assert "the loss's higher orders make up 90.91 ±" in finding.sentence and finding.headline.startswith(
        "90.91 ±"
    )
    assert finding.label.endswith("are the loss's higher orders")
    # Without the length itself in the grid the nearest stands, and is named.
    other = table.assign_coords(alpha=[0.25, 0.5, 1.25, 3.0])
    assert "at 1.25 times its length" in said(other)["model_error_update"].sentence


def test_trends_need_four_rows(table):
    found = said(table)
    assert found["gn_gap_trend"].resolved and "‖H − G‖ / ‖G‖ falls by" in found["gn_gap_trend"].sentence
    assert "6 measured steps; 32 sequences, 2,048 tokens each" in found["gn_gap_trend"].basis
    assert "update_curvature_trend" in found
    assert trends(GNHessianAnswers(table.isel(step=slice(3)))) == []


def test_what_was_not_measured_is_not_spoken_of(table, written):
    for empty in (table.isel(step=[]), xr.Dataset({"loss": ("step", [1.0])}, {"step": [0]})):
        assert gn_hessian_findings(GNHessianAnswers(empty)) == []
    for name in ("gn_gap", "trace", "lambda_max", "lambda_min_residual", "ritz_weight", "sequences"):
        said(table.drop_vars(name))
    for name in ("gn_gap_stderr", "linearisation_stderr", "lambda_max", "sequences"):
        said(changed(table.copy(deep=True), **{name: np.nan}))
    infinite = table.copy(deep=True)
    for name in infinite.data_vars:
        if infinite[name].dtype == float:
            infinite[name].loc[{"step": 30}] = np.inf
    assert all(each.steps[-1] == 24 for each in said(infinite).values())
    run = open_run(written[0])
    names = [each.name for each in findings(run)]
    assert names.index("gn_gap") < names.index("held_out_loss")
