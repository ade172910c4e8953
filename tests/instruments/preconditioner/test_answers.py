"""What is read off the `preconditioner` table equals dense algebra on the world it came from; ratios carry paired errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import (
    Finding,
    block_losses,
    block_steps,
    cross_layer_pays,
    decrease_ratios,
    decreases,
    efficiency,
    open_run,
    preconditioner_rows,
    scoreboard,
)
from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.decrease_ratios import closest, combine
from hessprobe.instruments.preconditioner.efficiency import JUDGED, READ
from hessprobe.instruments.preconditioner.findings import findings
from hessprobe.instruments.preconditioner.pictures import layerwise_over_full
from hessprobe.instruments.preconditioner.table import dims_of_variables
from hessprobe.reading.labelled import Labelled
from tests.instruments.preconditioner.runs import RECIPE, write_preconditioner_run

LAYERWISE, FULL = "layerwise_gn", "full_gn"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    folder = tmp_path_factory.mktemp("runs") / "world"
    log = open_run(
        write_preconditioner_run(folder, failing={"sophia": "ValueError: no"}, failed={20: "out of memory"})
    )
    return log["preconditioner"].to_dataset().load()


@pytest.fixture(scope="module")
def rows(table: xr.Dataset) -> xr.Dataset:
    found = preconditioner_rows(table)
    assert found is not None and found["step"].values.tolist() == [0, 10, 30]
    return found


def said(table: xr.Dataset) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings(PreconditionerAnswers(table))}


def parts(rows: xr.Dataset, name: str, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns a candidate's held-out slopes and damped curvatures (t, d, n, 1 + f): whole, then a fold left out."""
    at = rows.sel(candidate=name, damping=damping)
    slope, curvature, tokens = (
        at[key].values for key in ("slope_held_out", "curvature_held_out", "fold_tokens")
    )
    slopes, curvatures = [slope.sum(-1)], [curvature.sum(-1) + damping * at["norm2"].values]
    for k in range(slope.shape[-1]):
        kept = np.arange(slope.shape[-1]) != k
        again = (tokens.sum(-1) / tokens[:, kept].sum(-1))[:, None, None]
        slopes.append(slope[..., kept].sum(-1) * again)
        curvatures.append(curvature[..., kept].sum(-1) * again + damping * at["norm2"].values)
    return np.stack(slopes, -1), np.stack(curvatures, -1)


def test_everything_read_is_declared(table):
    declared = dims_of_variables()
    assert {*READ, *JUDGED} <= set(declared)
    assert all(table[name].dims == declared[name] for name in READ)


def test_decreases_are_those_of_the_stored_parts_and_give_the_stored_efficiency(rows):
    found = decreases(rows)
    for name in ("gradient", LAYERWISE, "update"):
        slope, curvature = parts(rows, name, 0.01)
        expected = slope**2 / (2 * curvature)
        at = found.sel(candidate=name, damping=0.01)
        np.testing.assert_allclose(at["held_out"], expected[..., 0], rtol=1e-12)
        np.testing.assert_allclose(at["left_out"], expected[..., 1:], rtol=1e-12)
    # The two were computed apart when the row was written: G_mu^-1 g by a dense solve, decreases by dense products.
    share = found["held_out"] / rows["optimal_decrease_held_out"]
    np.testing.assert_allclose(share, rows["efficiency_held_out"].transpose(*share.dims), rtol=1e-10)
    own = found["own"].sel(candidate=FULL) / rows["optimal_decrease"]
    np.testing.assert_allclose(own, 1, rtol=1e-10)


def test_what_points_uphill_decreases_nothing(rows):
    turned = rows.assign(slope_held_out=-rows["slope_held_out"])
    assert np.isnan(decreases(turned)["held_out"]).all() and scoreboard(turned)["uphill"].sum() == 12


def test_efficiency_over_training_has_errors_of_folds_and_draws(rows):
    over = efficiency(rows, damping=0.01, curvature_sequences=16)
    at = rows.sel(damping=0.01, curvature_sequences=16, candidate="muon")
    np.testing.assert_allclose(over["own"].sel(candidate="muon"), at["efficiency"].mean("draw"))
    spread = at["efficiency"].std("draw", ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(over["own_stderr"].sel(candidate="muon"), spread)
    slope, curvature = parts(rows, "muon", 0.01)
    shares = (slope**2 / (2 * curvature))[:, :, 1, 1:] / rows["optimal_decrease_held_out"].sel(
        damping=0.01
    ).values[:, None, None]
    left_out = shares.mean(1)
    folds = left_out.std(-1) * np.sqrt(left_out.shape[-1] - 1)
    spread = at["efficiency_held_out"].std("draw", ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(over["held_out_stderr"].sel(candidate="muon"), np.hypot(folds, spread))
    assert np.isnan(over["held_out"].sel(candidate="sophia")).all()
    alone = efficiency(rows.isel(draw=[0]))
    assert (
        np.isnan(alone["own_stderr"]).all()
        and np.isfinite(alone["held_out_stderr"].sel(candidate=FULL)).all()
    )


def test_a_ratio_is_paired_over_folds_and_averaged_over_draws_and_steps(rows):
    found = decrease_ratios(rows, other=FULL).sel(candidate="adam", damping=0.1)
    logs = []
    for name in ("adam", FULL):
        slope, curvature = parts(rows, name, 0.1)
        logs.append(np.log(slope**2 / curvature))
    log = logs[0] - logs[1]  # (t, d, n, 1 + f)
    np.testing.assert_allclose(found["ratio"], np.exp(log[..., 0].mean((0, 1))))
    np.testing.assert_allclose(found["per_step"], np.exp(log[..., 0].mean(1)))
    folds = log.mean(1)[..., 1:].var(-1) * (log.shape[-1] - 2)
    draws = (log[..., 0].var(1, ddof=1) / 2).mean(0)
    own = (folds.mean(0) + draws) / 3
    scatter = log[..., 0].mean(1).var(0, ddof=1) / 3
    np.testing.assert_allclose(found["stderr"], found["ratio"] * np.sqrt(np.maximum(own, scatter)))
    np.testing.assert_allclose(found["per_step_stderr"], found["per_step"] * np.sqrt(folds + draws))
    assert (found["steps"] == 3).all()
    same = decrease_ratios(rows).sel(candidate=LAYERWISE)
    assert (same["ratio"] == 1).all() and (same["stderr"] == 0).all()


def test_the_stated_error_covers_the_true_mean():
    """Numbers of known mean: fold noise shared by draws, noise of draws, both drawn anew at each step."""
    rng = np.random.default_rng(0)
    steps, draws, sizes, folds = 3, 4, 2, 16
    z = []
    for _ in range(400):
        noise = 0.4 * rng.standard_normal(
            (steps, 1, 1, folds)
        )  # of each fold's own share; they add to the whole's
        drawn = 0.1 * rng.standard_normal((steps, draws, sizes))
        values = 1.0 + drawn + noise.mean(-1)
        left_out = 1.0 + drawn[..., None] + (noise.sum(-1, keepdims=True) - noise) / (folds - 1)
        found = combine(values, np.broadcast_to(left_out, (steps, draws, sizes, folds)))
        z.append((found.mean - 1.0) / found.stderr)
    z = np.array(z)
    # The larger of two errors is stated, which makes them wide by a little: never narrow.
    assert 0.7 < z.std() < 1.05 and abs(z.mean()) < 0.1 and (np.abs(z) < 2).mean() > 0.94


def constructed(ratios: dict[int, float], scatter: float = 0.0, steps: int = 4, folds: int = 8) -> xr.Dataset:
    """Returns a table of two candidates, one damping, in which layerwise over full is known exactly, but for scatter."""
    rng, sizes = np.random.default_rng(3), list(ratios)
    dims = ("step", "draw", "candidate", "curvature_sequences", "damping")
    shape = (steps, 1, 2, len(sizes), 1)
    curvature = np.ones((*shape, folds)) / folds
    wanted = np.sqrt(np.array([[ratios[size] for size in sizes], np.ones(len(sizes))]))
    slope = -np.broadcast_to(wanted[None, None, :, :, None, None], curvature.shape) / folds
    slope = slope * (1 + scatter * rng.standard_normal(slope.shape))
    return xr.Dataset(
        {
            "slope_held_out": ((*dims, "fold"), slope),
            "curvature_held_out": ((*dims, "fold"), curvature),
            "fold_tokens": (("step", "fold"), np.full((steps, folds), 64.0)),
            "norm2": (dims, np.zeros(shape)),
            "slope": (dims, -np.ones(shape)),
            "curvature": (dims, np.ones(shape)),
            "failure": ("step", np.array([""] * steps, dtype=object)),
        },
        coords={
            "step": np.arange(steps) * 10, "draw": [0], "curvature_sequences": sizes, "damping": [0.1],
            "candidate": np.array([LAYERWISE, FULL], dtype=object), "fold": np.arange(folds),
            "block": np.array(["a", "b"], dtype=object), "other_block": np.array(["a", "b"], dtype=object),
        },
        attrs={"held_out_sequences": 64, "block_damping": 0.1, "cg_tolerance": 0.01},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "scatter", "verdict", "opening"),
    [
        ({16: 1.4, 64: 1.2, 256: 0.8}, 0.02, "pays from a size on", "begins to pay between 64 and 256"),
        ({16: 0.7, 64: 0.9, 256: 1.3}, 0.02, "pays up to a size", "ceases to pay between 64 and 256"),
        ({16: 0.7, 64: 0.8, 256: 0.9}, 0.01, "pays", "pays with 16, 64 and 256 curvature sequences"),
        ({16: 1.4, 64: 1.3, 256: 1.2}, 0.01, "does not pay", "does not pay with 16, 64 and 256"),
        ({16: 1.02, 64: 1.0, 256: 0.98}, 0.3, "not resolved", "cannot be told apart with 16, 64 and 256"),
    ],
)
def test_when_pairs_of_layers_pay(ratios, scatter, verdict, opening):
    log = constructed(ratios, scatter)
    pays = cross_layer_pays(log)
    assert str(pays["verdict"].values[0]) == verdict and int(pays["steps"][0]) == 4
    finding = said(log)["layerwise_over_full"]
    assert opening in finding.sentence and finding.resolved == (verdict != "not resolved")
    far = np.abs(np.log(pays["ratio"].values[0] / list(ratios.values()))) * pays["ratio"] / pays["stderr"]
    assert (far < 3).all()
    assert finding.value == float(pays["ratio"][0, -1]) and finding.stderr == float(pays["stderr"][0, -1])
    assert "4 measured steps, 1 draw of curvature batches, 64 held-out sequences in 8 folds" in finding.basis


def test_the_crossover_is_interpolated_with_its_error_and_bracket():
    log = constructed({16: 1.4, 64: 1.2, 256: 0.8})
    exact = cross_layer_pays(log).isel(damping=0)
    at = np.log(64) + np.log(1.2) / (np.log(1.2) - np.log(0.8)) * np.log(4)
    assert float(exact["crossover"]) == pytest.approx(np.exp(at), rel=1e-9)
    assert exact["below"] == 64 and exact["above"] == 256
    found = []
    for seed in range(30):
        noisy = constructed({64: 1.2, 256: 0.8})
        noise = np.random.default_rng(seed).standard_normal(noisy["slope_held_out"].shape)
        each = cross_layer_pays(noisy.assign(slope_held_out=noisy["slope_held_out"] * (1 + 0.1 * noise)))
        numbers = [np.log(float(each[n][0])) for n in ("crossover", "crossover_low", "crossover_high")]
        assert numbers[0] - numbers[1] == pytest.approx(numbers[2] - numbers[0])
        found.append((numbers[0] - at) / (numbers[0] - numbers[1]))
    assert abs(np.mean(found)) < 0.4 and 0.6 < np.std(found) < 1.4


def test_a_crossing_is_drawn_as_a_diamond_that_says_its_range():
    answers = PreconditionerAnswers(constructed({16: 1.4, 64: 1.2, 256: 0.8}, 0.02))
    picture: Any = layerwise_over_full([Labelled(label="", answers=answers, compared=answers)])
    held_out, own, diamond = picture.lines
    at = answers.pays.isel(damping=0)
    assert [held_out.label, own.label, diamond.group] == [
        "μ 0.1, held out",
        "μ 0.1, own batch",
        held_out.label,
    ]
    assert (diamond.x[0], diamond.y[0]) == (float(at["crossover"]), 1.0)
    assert f"({float(at['crossover_low']):.3g} to {float(at['crossover_high']):.3g})" in diamond.hover


def test_the_nearest_practical_method_and_how_many_cannot_be_told_from_it(rows):
    best, rivals, measured = closest(rows, ["gradient", "muon", "sophia"]) or ("", 0, 0)
    assert (best, rivals, measured) == ("gradient", 0, 2)
    twin = rows.sel(candidate=["gradient", LAYERWISE, "gradient"]).assign_coords(
        candidate=np.array(["gradient", LAYERWISE, "twin"], dtype=object)
    )
    assert (closest(twin, ["gradient", "twin"]) or ())[1:] == (1, 2)
    assert closest(rows, ["sophia"]) is None
    assert closest(rows.drop_sel(candidate=LAYERWISE), ["gradient"]) is None


def test_block_losses_name_what_each_layer_leaves(rows):
    losses = block_losses(rows)
    at = losses.sel(candidate=LAYERWISE)
    np.testing.assert_allclose(at["efficiency"], 1, rtol=1e-10)
    np.testing.assert_allclose(at["lost"], 0, atol=1e-10)
    row = rows.sel(candidate="muon", step=30)
    # Layerwise's own decrease within a block is that block's optimum.
    best = rows.sel(candidate=LAYERWISE, step=30)
    optimum = -best["block_slope"].values / 2
    bend = np.diagonal(row["block_curvature"].values) + 0.1 * row["block_norm2"].values
    reached = row["block_slope"].values ** 2 / (2 * bend)
    expected = (optimum - reached) / optimum.sum()
    np.testing.assert_allclose(losses["lost"].sel(candidate="muon", step=30), expected, rtol=1e-9, atol=1e-12)


def dense(row: xr.Dataset, kept: np.ndarray, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the held-out slope and S of some folds."""
    share = row["fold_tokens"].values[kept].sum() / row["fold_tokens"].values.sum()
    slope = row["block_slope_held_out"].values[:, kept].sum(-1) / share
    S = row["block_curvature_held_out"].values[..., kept].sum(-1) / share + mu * np.diag(row["block_norm2"])
    return slope, S


def test_step_sizes_by_block_are_those_of_dense_algebra(rows):
    row, mu = rows.sel(step=30), 0.1
    steps, folds = block_steps(row), row.sizes["fold"]
    for name in ("muon", "adam", FULL):
        at, each = row.sel(candidate=name), steps.sel(candidate=name)
        everything = np.arange(folds)
        slope, S = dense(at, everything, mu)
        single = slope.sum() ** 2 / S.sum()
        rates = -np.linalg.solve(S, slope)
        np.testing.assert_allclose(each["multiplier"], rates / (-slope.sum() / S.sum()), rtol=1e-8)
        own_S = at["block_curvature"].values + mu * np.diag(at["block_norm2"])
        own = -np.linalg.solve(own_S, at["block_slope"].values)
        gain = (slope @ own) ** 2 / (own @ S @ own) / single
        assert float(each["gain"].sel(found="own batch", known="together")) == pytest.approx(gain, rel=1e-8)
        alone = -at["block_slope"].values / np.diagonal(own_S)
        gain = (slope @ alone) ** 2 / (alone @ S @ alone) / single
        assert float(each["gain"].sel(found="own batch", known="alone")) == pytest.approx(gain, rel=1e-8)
        judged = np.zeros(2)
        left_out = []
        for k in range(folds):
            rest = dense(at, everything[everything != k], mu)
            a = -np.linalg.solve(rest[1], rest[0])
            left_out.append(a / (-rest[0].sum() / rest[1].sum()))
            one = dense(at, everything[everything == k], mu)
            judged += np.array([one[0] @ a, a @ one[1] @ a]) / folds
        gain = judged[0] ** 2 / judged[1] / single
        found = each["gain"].sel(found="other sequences", known="together")
        assert float(found) == pytest.approx(gain, rel=1e-8)
        error = np.std(left_out, axis=0) * np.sqrt(folds - 1)
        np.testing.assert_allclose(each["multiplier_stderr"], error, rtol=1e-8)
    # The full step's own best rates are all 1, and tuning buys nothing on its own batch.
    full = steps.sel(candidate=FULL)
    np.testing.assert_allclose(full["own_multiplier"], 1, rtol=1e-8)
    assert float(full["gain"].sel(found="own batch", known="together")) == pytest.approx(1)
    assert np.isnan(steps.sel(candidate="sophia")["gain"]).all()


def test_a_direction_scaled_wrongly_by_layer_is_found_out(rows):
    """Full Gauss-Newton's direction with one layer's step too short by 3: that layer asks for 3 times the others'."""
    row = rows.sel(step=30, candidate=[FULL]).load()
    factor = np.ones(row.sizes["block"])
    factor[2] = 1 / 3
    pair = factor[:, None] * factor
    crooked = row.assign(
        block_slope=row["block_slope"] * factor, block_norm2=row["block_norm2"] * factor**2,
        block_curvature=row["block_curvature"] * pair,
        block_slope_held_out=row["block_slope_held_out"] * factor[:, None],
        block_curvature_held_out=row["block_curvature_held_out"] * pair[..., None],
    )  # fmt: skip
    straight, bent = block_steps(row).isel(candidate=0), block_steps(crooked).isel(candidate=0)
    np.testing.assert_allclose(bent["own_multiplier"][2] / bent["own_multiplier"][0], 3, rtol=1e-8)
    ratio = (bent["multiplier"][2] / bent["multiplier"][0]) / (
        straight["multiplier"][2] / straight["multiplier"][0]
    )
    assert float(ratio) == pytest.approx(3)
    at = {"found": "other sequences", "known": "together"}
    assert float(bent["gain"].sel(at)) > 1.02 * float(straight["gain"].sel(at))


def test_a_block_that_does_not_move_asks_for_no_step(rows):
    row = rows.sel(step=30, candidate=["adam"]).load().copy(deep=True)
    for name in ("block_slope", "block_norm2", "block_curvature", "block_slope_held_out"):
        row[name][:, 1] = 0
    row["block_curvature"][:, :, 1] = 0
    row["block_curvature_held_out"][:, 1] = 0
    row["block_curvature_held_out"][:, :, 1] = 0
    steps = block_steps(row).isel(candidate=0)
    assert np.isnan(steps["multiplier"][1]) and np.isfinite(steps["multiplier"].values[[0, 2, 3, 4, 5]]).all()
    assert np.isfinite(steps["gain"]).all() and np.isfinite(steps["gain_stderr"]).all()


def test_findings_state_their_numbers_with_error_and_basis(table, rows):
    found = said(table)
    update = found["update_efficiency"]
    assert update.value == float(efficiency(rows)["held_out"].sel(candidate="update", step=30))
    assert update.steps == (30,) and "± " in update.sentence and "1 measured step, 2 draws" in update.basis
    nearest = found["nearest_layerwise"]
    ratios = decrease_ratios(rows).isel(damping=0, curvature_sequences=-1)["ratio"]
    practical = [n for n in RECIPE.names if n not in (LAYERWISE, FULL, "grouped_gn_2")]
    assert (
        nearest.value == float(ratios.sel(candidate=practical).max()) and "Of 9 practical" in nearest.sentence
    )
    lost = block_losses(rows)["lost"].sel(candidate="update", step=30)
    assert found["block_loses_most"].value == float(lost.max()) and found["block_loses_most"].stderr is None
    assert str(rows["block"].values[lost.values.argmax()]) in found["block_loses_most"].sentence
    gain = block_steps(rows.sel(step=30)).sel(candidate="update", found="other sequences", known="together")
    assert found["step_size_per_layer"].value == float(gain["gain"])
    assert "layerwise_over_full_0.01" in found and "layerwise_over_full_trend" not in found  # three rows


def test_a_trend_needs_four_rows_and_two_errors():
    log = constructed({16: 1.4, 64: 1.2}, 0.01)
    rising = log["slope_held_out"].copy()
    rising[:, :, 0] *= np.linspace(1.0, 1.3, 4).reshape(4, 1, 1, 1, 1)
    finding = said(log.assign(slope_held_out=rising))["layerwise_over_full_trend"]
    assert finding.resolved and "rises by" in finding.sentence and "from step 0 to 30" in finding.sentence
    assert not said(log)["layerwise_over_full_trend"].resolved
    assert "layerwise_over_full_trend" not in said(log.isel(step=slice(3)))


def test_one_fold_one_draw_one_row_leave_no_error_and_no_claim():
    log = constructed({64: 1.3}, steps=1, folds=1)
    finding = said(log)["layerwise_over_full"]
    assert finding.stderr is None and not finding.resolved and finding.value == pytest.approx(1.3)
    assert "cannot be told apart" in finding.sentence


def test_cut_off_solves_are_said_in_the_basis(rows):
    loose = rows.assign(solver_residual=rows["solver_residual"] * 100)
    assert (
        "solves cut off at residuals up to 0.2, where 0.01 was wanted"
        in said(loose)["layerwise_over_full"].basis
    )
    assert "cut off" not in said(rows)["layerwise_over_full"].basis
    assert said(loose)["layerwise_over_full"].resolved
    early = said(rows.assign(solver_residual=rows["solver_residual"] * 200))["layerwise_over_full"]
    assert not early.resolved and "says little of exact ones" in early.sentence


def blank(table: xr.Dataset, **changes: Any) -> xr.Dataset:
    return table.assign({name: xr.full_like(table[name], value) for name, value in changes.items()})


def test_nothing_measured_or_another_version_means_nothing_found(table, tmp_path: Path):
    assert said(table.isel(step=[])) == {}
    assert said(blank(table, slope_held_out=np.nan)) == {}
    assert said(table.drop_vars("slope_held_out")) == {}
    assert cross_layer_pays(table.isel(step=[])).sizes["damping"] == 0
    assert cross_layer_pays(table.drop_sel(candidate=FULL)).sizes["damping"] == 0
    older = table.drop_vars(
        [name for name in table.data_vars if str(name).startswith(("block_", "condition"))]
    )
    names = said(older)
    assert "layerwise_over_full" in names and "step_size_per_layer" not in names
    assert "block_loses_most" not in names
    few = said(table.drop_sel(candidate=[LAYERWISE]))
    assert "layerwise_over_full" not in few and "nearest_layerwise" not in few and "update_efficiency" in few
    assert "layerwise_over_full" in said(table.drop_sel(candidate=["update"]))
    infinite = blank(table, norm2=np.inf)
    assert "layerwise_over_full" not in said(infinite)
