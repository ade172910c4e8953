"""G against H from the table: shares with their errors, spectra of known matrices, and the two errors of a step's model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import open_run
from hessprobe.instruments.gn_hessian.ladder import full_length, ladder
from hessprobe.instruments.gn_hessian.norms import (
    block_gap,
    curvature_ratio,
    errors_to_claim,
    gn_gap,
    residual_by_block,
    traces,
)
from hessprobe.instruments.gn_hessian.spectrum import extremes, negative_curvature, smoothed_density
from tests.instruments.gn_hessian.runs import STEPS, Truth, nodes, write_gn_run

ALL = (gn_gap, block_gap, residual_by_block, traces, curvature_ratio, extremes, negative_curvature, ladder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Truth]]:
    return write_gn_run(tmp_path_factory.mktemp("gn") / "run", density_blocks=["block.1"])


@pytest.fixture
def table(written) -> xr.Dataset:
    return open_run(written[0])["gn_hessian"].to_dataset().load()


@pytest.fixture
def made(written) -> dict[int, Truth]:
    return written[1]


def test_the_gap_and_the_residuals_share_are_those_of_the_matrices(table, made):
    rows = gn_gap(table)
    for step, known in made.items():
        g, h, r = known.matrices
        row = rows.sel(step=step)
        assert float(row["gn_gap"]) == pytest.approx(np.linalg.norm(r) / np.linalg.norm(g))
        share = (r**2).sum() / ((r**2).sum() + (g**2).sum())
        assert float(row["residual_share"]) == pytest.approx(share)
        value, error = float(row["gn_gap"]), float(row["gn_gap_stderr"])
        slope = ((value + 1e-6) ** 2 / (1 + (value + 1e-6) ** 2) - share) / 1e-6
        assert float(row["residual_share_stderr"]) == pytest.approx(slope * error, rel=1e-4)
        assert float(row["cosine"]) == pytest.approx((g * h).sum() / np.linalg.norm(g) / np.linalg.norm(h))
    assert traces(table)["trace"].sel(matrix="residual", step=6) == pytest.approx(
        np.trace(made[6].matrices[2])
    )
    gap = block_gap(table).sel(step=6, block="block.0")
    at = np.ix_(range(4, 8), range(4, 8))
    of_r, of_g = (np.linalg.norm(made[6].matrices[m][at]) for m in (2, 0))
    assert float(gap["gn_gap"]) == pytest.approx(of_r / of_g)


def test_where_the_residual_lies_carries_the_errors_of_all_blocks(table):
    row = residual_by_block(table).sel(step=12)
    assert float(row["share"].sum()) == pytest.approx(1)
    stored = table.sel(step=12, matrix="residual")
    rng = np.random.default_rng(0)
    drawn = stored["block_fro2"].values + stored["block_fro2_stderr"].values * rng.standard_normal((20000, 6))
    shares = drawn / drawn.sum(1, keepdims=True)
    np.testing.assert_allclose(row["share_stderr"], shares.std(0), rtol=0.05)


def test_the_curvature_ratio_is_the_directions_own_and_nothing_where_g_has_none(table, made):
    ratio = curvature_ratio(table)
    (g, h, _), d = made[18].matrices, made[18].directions
    for i, name in enumerate(table["direction"].values):
        assert float(ratio.sel(step=18, direction=name)) == pytest.approx(
            (d[i] @ h @ d[i]) / (d[i] @ g @ d[i])
        )
    table["direction_curvature"].loc[{"step": 0, "matrix": "gauss_newton", "direction": "update"}] = 0.0
    assert np.isnan(float(curvature_ratio(table).sel(step=0, direction="update")))


@pytest.mark.parametrize("block", [None, "block.1"])
def test_densities_integrate_to_one_and_have_the_moments_of_the_probes(table, made, block):
    density = smoothed_density(table.sel(step=24), block)
    assert density is not None
    at, width = density["eigenvalue"].values, density.attrs["width"]
    of_block = slice(8, 12) if block else slice(None)
    matrices = made[24].matrices[:, of_block, of_block]
    prefix = "block_" if block else ""
    stored = table.sel(step=24) if block is None else table.sel(step=24, density_block=block)
    for name, known in zip(("gauss_newton", "hessian", "residual"), matrices, strict=True):
        line = density["density"].sel(matrix=name).values
        assert np.trapezoid(line, at) == pytest.approx(1, abs=1e-8)
        value, weight = (
            np.nan_to_num(stored[f"{prefix}{n}"].sel(matrix=name).values)
            for n in ("ritz_value", "ritz_weight")
        )
        for power in (1, 2):
            blurred = np.trapezoid(line * at**power, at) - (width**2 if power == 2 else 0)
            assert blurred == pytest.approx((weight * value**power).sum(1).mean(), rel=1e-6, abs=1e-8)
        ends = np.linalg.eigvalsh(known)[[0, -1]]
        assert at[0] < ends[0] < ends[1] < at[-1]
        low, high = (density[n].sel(matrix=name).values for n in ("low", "high"))
        assert (low <= line + 1e-15).all() and (line <= high + 1e-15).all()


def test_from_a_full_set_of_starts_the_negative_part_is_exactly_the_matrices(tmp_path):
    """The unit vectors' spectral measures average to the spectrum itself."""
    _, made = write_gn_run(tmp_path / "run", steps=(0, 5), probes=24, train_steps=2)
    table = open_run(tmp_path / "run")["gn_hessian"].to_dataset().load()
    for step in (0, 5):
        value, weight = nodes(made[step].matrices, np.eye(24))
        table["ritz_value"].loc[{"step": step}] = value
        table["ritz_weight"].loc[{"step": step}] = weight
    found = negative_curvature(table)
    for step in (0, 5):
        for name, known in zip(table["matrix"].values, made[step].matrices, strict=True):
            eigenvalues, row = np.linalg.eigvalsh(known), found.sel(step=step, matrix=name)
            below = eigenvalues < 0 if name != "gauss_newton" else np.zeros(24, dtype=bool)
            assert float(row["mass"]) == pytest.approx(below.mean(), abs=1e-12)
            share = np.abs(eigenvalues[below]).sum() / np.abs(eigenvalues).sum()
            assert float(row["share"]) == pytest.approx(share, abs=1e-12)
            assert float(row["mass_low"]) <= below.mean() <= float(row["mass_high"])
    density = smoothed_density(table.sel(step=0))
    assert density is not None
    first = np.trapezoid(
        density["density"].sel(matrix="hessian") * density["eigenvalue"], density["eigenvalue"]
    )
    assert first == pytest.approx(np.trace(made[0].matrices[1]) / 24)


def test_the_negative_shares_error_is_the_jackknife_over_starts(table):
    row = table.sel(step=6, matrix="hessian")
    value, weight = row["ritz_value"].values, row["ritz_weight"].values
    size = weight * np.abs(value)

    def share(keep) -> float:
        return (size * (value < 0))[keep].sum() / size[keep].sum()

    left_out = np.array([share([j for j in range(3) if j != i]) for i in range(3)])
    found = negative_curvature(table).sel(step=6, matrix="hessian")
    assert float(found["share"]) == pytest.approx(share([0, 1, 2]))
    expected = np.sqrt(2 / 3 * ((left_out - left_out.mean()) ** 2).sum())
    assert float(found["share_stderr"]) == pytest.approx(expected)
    mass = (weight * (value < 0)).sum(1)
    assert float(found["mass"]) == pytest.approx(mass.mean())
    assert float(found["mass_stderr"]) == pytest.approx(mass.std(ddof=1) / np.sqrt(3))
    alone = negative_curvature(table.isel(probe=[0])).sel(matrix="hessian")
    assert np.isnan(alone["share_stderr"]).all() and np.isfinite(alone["share"]).all()


def test_round_off_is_no_negative_curvature(table):
    """G has no negative eigenvalue: what its nodes show below zero is round-off, for H too."""
    table["ritz_value"].loc[{"matrix": "gauss_newton", "ritz": 0}] = -3e-3
    table["ritz_value"].loc[{"matrix": "hessian"}] = np.abs(table["ritz_value"].sel(matrix="hessian").values)
    table["ritz_value"].loc[{"matrix": "hessian", "ritz": 0}] = -2e-3
    found = negative_curvature(table)
    assert (found.sel(matrix=["gauss_newton", "hessian"])["mass"] == 0).all()
    table["ritz_value"].loc[{"matrix": "hessian", "ritz": 0}] = -4e-3
    assert (negative_curvature(table).sel(matrix="hessian")["share"] > 0).all()


def test_nodes_beyond_a_krylov_space_and_lost_starts_are_left_out(table):
    short = table.copy(deep=True)
    for name in ("ritz_value", "ritz_weight"):
        short[name].loc[{"ritz": list(range(20, 24)), "probe": 1}] = np.nan
        short[name].loc[{"probe": 2, "step": 6}] = np.nan
    density = smoothed_density(short.sel(step=6))
    assert density is not None and np.isfinite(density["density"].values).all()
    two = negative_curvature(short.isel(probe=[0, 1]))
    three = negative_curvature(short)
    for name in ("share", "share_stderr", "mass", "mass_low"):
        np.testing.assert_allclose(three[name].sel(step=6), two[name].sel(step=6))
    short["ritz_value"][:] = np.nan
    assert smoothed_density(short.sel(step=6)) is None and negative_curvature(short).sizes["step"] == 0


def test_a_matrix_without_curvature_still_has_a_density(table):
    for name in ("ritz_value",):
        table[name].loc[{"step": 0}] = 0.0
    density = smoothed_density(table.sel(step=0))
    assert density is not None
    total = np.trapezoid(density["density"].sel(matrix="hessian"), density["eigenvalue"])
    assert total == pytest.approx(1, abs=1e-6)
    assert np.isnan(float(negative_curvature(table).sel(step=0, matrix="hessian")["share"]))


def test_the_two_errors_add_up_and_the_larger_is_named_where_their_errors_allow(table):
    rows = ladder(table)
    change = rows["change"]
    whole = change.sel(model="loss") - change.sel(model="gauss_newton")
    np.testing.assert_allclose(rows["beyond_second_order"] + rows["linearisation"], whole, atol=1e-12)
    row = rows.sel(step=0, ladder_direction="update", alpha=1.0)
    assert float(row["share"]) == pytest.approx(0.08 / 0.10) and row["dominant"] == "linearisation"
    assert bool(row["cancel"]) and full_length(rows) == 1.0
    # At step 30 the two are .03 and .02: apart by .01, where 5 % of both leave .005.
    table["linearisation_stderr"].loc[{"step": 30}] = 0.004
    assert ladder(table).sel(step=30, ladder_direction="update", alpha=1.0)["dominant"] == ""
    table["linearisation_stderr"].loc[{"step": 30}] = 0.003
    assert ladder(table).sel(step=30, ladder_direction="update", alpha=1.0)["dominant"] == "linearisation"
    assert (
        ladder(table).sel(step=30, ladder_direction="update", alpha=2.0)["dominant"] == "beyond_second_order"
    )
    # One sequence gives no error, and no claim.
    table["sequences"][:] = 1.0
    assert (ladder(table)["dominant"] == "").all() and not ladder(table)["cancel"].any()


@pytest.mark.parametrize("correlation", [-1.0, 0.0, 1.0])
def test_the_shares_error_bounds_it_whatever_the_correlation(table, correlation):
    row = ladder(table).sel(step=0, ladder_direction="update", alpha=1.0)
    rng = np.random.default_rng(3)
    first, second = rng.standard_normal((2, 20000))
    second = correlation * first + np.sqrt(1 - correlation**2) * second
    beyond = float(row["beyond_second_order"]) + float(row["beyond_second_order_stderr"]) * first
    linear = float(row["linearisation"]) + float(row["linearisation_stderr"]) * second
    spread = (np.abs(linear) / (np.abs(linear) + np.abs(beyond))).std()
    assert spread <= 1.02 * float(row["share_stderr"])
    if correlation == 1.0:  # of opposite signs: the worst case is reached
        assert spread == pytest.approx(float(row["share_stderr"]), rel=0.05)


def test_few_probes_need_more_errors_for_a_claim():
    assert errors_to_claim(7) == pytest.approx(2.3646) and errors_to_claim(1) == pytest.approx(12.7062)
    assert errors_to_claim(10**5) == pytest.approx(2, abs=0.01) and errors_to_claim(0) == np.inf
    assert errors_to_claim(10**5, 15) > 2.7


@pytest.mark.parametrize("ask", ALL)
def test_tables_of_other_versions_give_no_rows_but_no_error(table, ask):
    bare = xr.Dataset({"loss": ("step", [1.0, 2.0])}, {"step": [0, 1]})
    assert ask(bare).sizes["step"] == 0
    assert ask(table.isel(step=[])).sizes["step"] == 0
    failed = table.assign(failure=("step", np.array(["no memory"] * len(STEPS), dtype=object)))
    assert ask(failed).sizes["step"] == 0
    for name in table.data_vars:
        ask(table.drop_vars(name))
    fewer = ask(table.sel(matrix=["gauss_newton", "hessian"]))
    assert fewer.sizes["step"] == len(STEPS)
