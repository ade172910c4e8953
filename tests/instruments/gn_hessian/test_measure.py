"""Every number of the table `gn_hessian` is the dense truth's: exact ones to 1e-8, estimates by z-score and coverage."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.residual import Residual
from hessprobe.errors import UserError
from hessprobe.instruments.gn_hessian.measure.probe import GNHessianProbe
from hessprobe.instruments.gn_hessian.table import DIRECTIONS, LADDER_DIRECTIONS, MODELS
from hessprobe.instruments.snapshot import Row
from hessprobe.measuring.row_recorder import ProbeRecorder, build_probes
from hessprobe.recipe import GNHessianRecipe, PreconditionerRecipe, Recipe
from hessprobe.store.writer import RunWriter
from tests import models, oracles
from tests.cases import Case
from tests.instruments.gn_hessian.truth import (
    ALPHAS,
    DAMPING,
    SEEDS,
    case_of,
    matrices,
    probe,
    snapshot_of,
    truths,
)

EXACT = 1e-8
ZOO = (
    "decoder",
    "decoder_swiglu_layernorm",
    "decoder_tied",
    "decoder_ragged",
    "layernorm",
    "mlp_regression",
)


@cache
def row_of(name: str) -> Row:
    return probe().measure(snapshot_of(case_of(name)))


@cache
def rows_of_seeds(samples: int = 8) -> list[Row]:
    """Returns a small case's rows at many seeds, with the cheapest spectra and steps.

    Coverage of the stated errors needs more seeds: tests/estimation/test_shared_probes.py.
    """
    instrument = probe(samples=samples, block_samples=samples, cg_iterations=1, alphas=(1.0,))
    return [instrument.measure(snapshot_of(case_of("mlp_classifier"), seed)) for seed in range(SEEDS)]


def directions_of(case: Case) -> dict[str, Tensor]:
    """Returns those directions that the truth alone decides."""
    g, gradient = case.truth.gauss_newton, case.truth.gradient
    update = snapshot_of(case).update
    assert update is not None
    damped = g + DAMPING * torch.eye(len(g), dtype=g.dtype)
    return {
        "negative_gradient": -gradient,
        "update": update,
        "gauss_newton_step": torch.linalg.solve(damped, -gradient),
    }


def moved_loss(case: Case, theta: Tensor) -> float:
    model = copy.deepcopy(case.problem.model)
    case.partition.assign(model, theta)
    total, tokens = 0.0, 0
    for inputs, targets in case.problem.batches:
        z, y = flat(model(inputs), targets)
        total += float(oracles.token_losses(case.problem.loss, z, y).detach().sum())
        tokens += len(y)
    return total / tokens


def flat(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = z.reshape(-1, z.shape[-1])
    if targets.is_floating_point():
        return z, targets.reshape(z.shape)
    valid = targets.reshape(-1) != models.IGNORED
    return z[valid], targets.reshape(-1)[valid]


def prox_linear(case: Case, d: Tensor, alpha: float) -> float:
    """Returns mean loss(z + alpha J d), J d by reverse mode alone: the derivative of J^T w along w, times d."""
    model, total, tokens = case.problem.model, 0.0, 0
    by_name, named = case.partition.unflatten(d), dict(case.problem.model.named_parameters())
    for inputs, targets in case.problem.batches:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
            z, y = flat(model(inputs), targets)
            w = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(
                z, [named[n] for n in by_name], w, create_graph=True, allow_unused=True
            )
            pairs = [(g, by_name[n]) for n, g in zip(by_name, pulled, strict=True) if g is not None]
            (jd,) = torch.autograd.grad([g for g, _ in pairs], w, [t for _, t in pairs])
        total += float(oracles.token_losses(case.problem.loss, z.detach() + alpha * jd, y).sum())
        tokens += len(y)
    return total / tokens


def z_scores(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns (mean - wanted) / standard error over the first dimension; what never varies has to be equal."""
    error, stderr = found.mean(0) - wanted, found.std(0) / len(found) ** 0.5
    exact = stderr < 1e-12
    assert bool((error[exact].abs() < 1e-9).all())
    return (error / stderr)[~exact]


# -- exact quantities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_slope_and_curvature_along_directions_are_exact(name):
    case, row = case_of(name), row_of(name)
    for direction, d in directions_of(case).items():
        i = DIRECTIONS.index(direction)
        assert float(row["direction_norm"][i]) == pytest.approx(float(d.norm()), rel=EXACT)
        slope = float(case.truth.gradient @ d / d.norm())
        assert float(row["direction_slope"][i]) == pytest.approx(slope, rel=EXACT)
        wanted = torch.stack([d @ matrix @ d / d.square().sum() for matrix in matrices(case)])
        assert float((row["direction_curvature"][:, i] - wanted).abs().max()) < EXACT * float(
            wanted.abs().max()
        )
    assert row["gauss_newton_step_residual"] < 1e-10
    assert float(row["loss"]) == pytest.approx(float(case.truth.loss), rel=1e-12)
    assert row["tokens"] == case.truth.tokens
    assert row["symmetry_gap"] < 1e-10


@pytest.mark.parametrize("name", ZOO)
def test_the_ladder_is_exact_on_every_rung(name):
    case, row = case_of(name), row_of(name)
    theta, truth = case.partition.vector(case.problem.model), case.truth
    for i, direction in enumerate(LADDER_DIRECTIONS):
        d = directions_of(case)[direction]
        wanted = torch.tensor([
            [alpha * truth.gradient @ d + alpha**2 / 2 * (d @ truth.gauss_newton @ d) for alpha in ALPHAS],
            [alpha * truth.gradient @ d + alpha**2 / 2 * (d @ truth.hessian @ d) for alpha in ALPHAS],
            [prox_linear(case, d, alpha) - float(truth.loss) for alpha in ALPHAS],
            [moved_loss(case, theta + alpha * d) - float(truth.loss) for alpha in ALPHAS],
        ], dtype=torch.float64)  # fmt: skip
        assert oracles.relative_error(row["change"][i], wanted) < EXACT
        scale = float(wanted.abs().max())
        for found, upper, lower in (("beyond_second_order", 2, 0), ("linearisation", 3, 2)):
            assert float((row[found][i] - (wanted[upper] - wanted[lower])).abs().max()) < EXACT * scale
    assert MODELS == ("gauss_newton", "hessian", "prox_linear", "loss")


def test_short_steps_keep_their_digits():
    """At alpha = 1e-4 the third-order error is 1e-12 of the loss; along alpha it must still fall as alpha cubed."""
    case = case_of("decoder")
    alphas = (1e-4, 1e-3, 1e-2)
    row = probe(alphas=alphas, cg_iterations=3).measure(snapshot_of(case))
    beyond = row["beyond_second_order"][0]
    slopes = (beyond[1:] / beyond[:-1]).abs().log10()
    assert float((slopes - 3).abs().max()) < 0.2
    # Linearising costs R's curvature first: half d.R d alpha^2.
    d = directions_of(case)["update"]
    bent = 0.5 * float(d @ case.truth.residual @ d) * alphas[0] ** 2
    assert float(row["linearisation"][0, 0]) == pytest.approx(bent, rel=1e-2)


def test_errors_of_the_ladder_are_the_jackknife_over_sequences_of_different_lengths():
    """Sequences have 0 to 6 targets: the mean over tokens is a ratio, and so is its error."""
    case, row = case_of("decoder_ragged"), row_of("decoder_ragged")
    d, alpha = directions_of(case)["update"], ALPHAS[2]
    theta = case.partition.vector(case.problem.model)
    sums, tokens = [], []
    for inputs, targets in case.problem.batches:
        for x, y in zip(inputs, targets, strict=True):
            count = int((y != models.IGNORED).sum())
            if count:
                one = replace(case, problem=case.problem._replace(batches=[(x[None], y[None])]))
                bent = moved_loss(one, theta + alpha * d) - prox_linear(one, d, alpha)
                sums.append(bent * count)
                tokens.append(count)
    total, count, n = sum(sums), sum(tokens), len(sums)
    left_out = np.array([(total - s) / (count - t) for s, t in zip(sums, tokens, strict=True)])
    wanted = ((left_out - left_out.mean()) ** 2).sum() * (n - 1) / n
    assert float(row["linearisation"][0, 2]) == pytest.approx(total / count, rel=EXACT)
    assert float(row["linearisation_stderr"][0, 2]) == pytest.approx(wanted**0.5, rel=1e-7)
    assert bool((row["beyond_second_order_stderr"] > 0).all())


# -- estimates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "block_"])
@pytest.mark.parametrize("quantity", ["fro2", "trace"])
def test_norms_and_traces_are_unbiased(quantity, prefix):
    name = prefix + quantity
    found = torch.stack([row[name] for row in rows_of_seeds()])
    assert float(z_scores(found, truths(case_of("mlp_classifier"))[name]).abs().max()) < 3.5


@pytest.mark.parametrize("prefix", ["", "block_"])
@pytest.mark.parametrize("quantity", ["gn_gap", "cosine"])
def test_ratios_are_nearly_unbiased(quantity, prefix):
    """The jackknife leaves a bias of second order in 1/8: a fifth of one row's error is allowed for it."""
    name = prefix + quantity
    found = torch.stack([row[name] for row in rows_of_seeds()])
    wanted = truths(case_of("mlp_classifier"))[name]
    spread = found.std(0)
    assert bool(((found.mean(0) - wanted).abs() < (0.2 + 3.5 / SEEDS**0.5) * spread + 1e-9).all())


def test_the_three_matrices_of_a_row_saw_the_same_probes():
    """v.H v = v.G v + v.R v on every probe, so it holds of the means to rounding."""
    for row in rows_of_seeds()[:3]:
        for name in ("trace", "block_trace"):
            g, h, r = row[name]
            torch.testing.assert_close(h, g + r, rtol=1e-12, atol=1e-12)


# -- spectra -----------------------------------------------------------------------------------------------


@cache
def with_spectra() -> tuple[Case, Row]:
    case = case_of("layernorm")
    instrument = probe(lanczos_steps=20, lanczos_probes=2, density_blocks=("0",), cg_iterations=1)
    return case, instrument.measure(snapshot_of(case))


def test_extreme_ritz_values_are_the_matrices_own_within_their_residuals():
    case, row = with_spectra()
    for i, matrix in enumerate(matrices(case)):
        eigenvalues = torch.linalg.eigvalsh(matrix)
        scale = float(eigenvalues.abs().max())
        for name, wanted in (("lambda_max", eigenvalues[-1]), ("lambda_min", eigenvalues[0])):
            found, residual = float(row[name][i]), float(row[f"{name}_residual"][i])
            assert float((eigenvalues - found).abs().min()) <= residual + 1e-10 * scale
            assert abs(found - float(wanted)) < 1e-4 * scale
    assert float(row["lambda_min"][1]) < 0, "this Hessian is indefinite"


def test_densities_are_quadratures_of_the_spectra():
    case, row = with_spectra()
    assert row["ritz_value"].shape == (3, 2, 20)
    torch.testing.assert_close(row["ritz_weight"].nansum(-1), torch.ones(3, 2, dtype=torch.float64))
    # The first moment of a start v is v.A v / p: the starts are signs, the same for all three matrices.
    first = (row["ritz_value"] * row["ritz_weight"]).nansum(-1)
    torch.testing.assert_close(first[1], first[0] + first[2], rtol=1e-9, atol=1e-12)
    for i, matrix in enumerate(matrices(case)):
        spread = (2 * (matrix.square().sum() - matrix.diagonal().square().sum())).sqrt() / len(matrix)
        assert float((first[i] - matrix.trace() / len(matrix)).abs().max()) < 3.5 * float(spread)


def test_a_blocks_density_is_that_of_its_diagonal_block():
    case, row = with_spectra()
    where = case.partition.slices["0"]
    assert row["block_ritz_value"].shape == (3, 1, 2, 20)
    for i, matrix in enumerate(matrices(case)):
        eigenvalues = torch.linalg.eigvalsh(matrix[where, where])
        nodes, residuals = row["block_ritz_value"][i, 0], row["block_ritz_residual"][i, 0]
        live = nodes.isfinite()
        distance = (nodes[live][:, None] - eigenvalues).abs().amin(-1)
        assert bool((distance <= residuals[live] + 1e-9 * eigenvalues.abs().max()).all())
        assert float(nodes[live].max()) == pytest.approx(float(eigenvalues[-1]), rel=1e-3)


def test_the_top_eigenvector_points_downhill_and_has_the_top_curvature():
    case, row = with_spectra()
    i = DIRECTIONS.index("top_eigenvector")
    assert float(row["direction_norm"][i]) == pytest.approx(1)
    assert float(row["direction_slope"][i]) < 0
    assert float(row["direction_curvature"][0, i]) == pytest.approx(float(row["lambda_max"][0]), rel=1e-8)
    vector = torch.linalg.eigh(case.truth.gauss_newton).eigenvectors[:, -1]
    wanted = float(vector @ case.truth.hessian @ vector)
    assert float(row["direction_curvature"][1, i]) == pytest.approx(wanted, rel=1e-3)


def test_a_random_direction_has_the_mean_curvature():
    case = case_of("mlp_classifier")
    i = DIRECTIONS.index("random")
    found = torch.stack([row["direction_curvature"][:, i] for row in rows_of_seeds()])
    wanted = torch.stack([matrix.trace() / len(matrix) for matrix in matrices(case)])
    assert float(z_scores(found, wanted).abs().max()) < 3.5


@pytest.mark.parametrize("name", models.LINEAR)
def test_nothing_is_left_of_the_residual_where_the_model_is_linear(name):
    row = probe().measure(snapshot_of(case_of(name)))
    assert float(row["gn_gap"]) == 0 and float(row["cosine"]) == pytest.approx(1)
    assert not row["fro2"][2].any() and not row["direction_curvature"][2].any()
    assert float(row["linearisation"].abs().max()) < 1e-12
    assert float(row["lambda_max"][2]) == float(row["lambda_min"][2]) == 0
    # A zero matrix has one node, at zero; the rest of its places stay empty.
    assert bool(row["ritz_value"][2, :, 1:].isnan().all())


# -- the table, and what is missing ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"density_blocks": ("0", "3", "0")}], ids=str)
def test_the_row_is_what_the_table_declares(options):
    case, instrument = case_of("layernorm"), probe(**options)
    table, row = instrument.table(case.partition), instrument.measure(snapshot_of(case))
    assert {v.name for v in table.variables} == set(row) | {"seconds", "peak_memory"}
    for variable in table.variables:
        if variable.name in row:
            assert np.shape(row[variable.name]) == table.row_shape(variable), variable.name
    assert table.name == instrument.name == "gn_hessian"


def test_a_density_of_an_unknown_block_is_refused_before_the_run():
    with pytest.raises(UserError, match=r"block of gn_hessian.density_blocks.*block\.9.*embedding, block\.0"):
        probe(density_blocks=("block.9",)).table(case_of("decoder").partition)


def test_products_from_graphs_are_compared_with_others_on_the_first_row_alone(monkeypatch):
    calls, real = [], Hessian._compare
    monkeypatch.setattr(
        Hessian, "_compare", lambda self, piece: calls.append(type(self)) or real(self, piece)
    )
    case, instrument = case_of("layernorm"), probe()
    first, second = (instrument.measure(snapshot_of(case)) for _ in range(2))
    assert calls == [Residual, Hessian]
    for name in ("fro2", "ritz_value", "change"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)


def test_a_model_whose_graphs_cannot_be_kept_gives_the_same_row():
    case = case_of("layernorm")
    wanted, found = (i.measure(snapshot_of(case)) for i in (probe(), without_memory(probe())))
    for name in ("direction_curvature", "change", "block_fro2"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-12)


def test_a_row_depends_on_seed_and_step_alone():
    case = case_of("mlp_classifier")
    snapshot, instrument = snapshot_of(case), probe()
    row, again = instrument.measure(snapshot), probe().measure(snapshot)
    others = [instrument.measure(replace(snapshot, seed=1)), instrument.measure(replace(snapshot, step=4))]
    for name in ("fro2", "block_fro2", "ritz_value", "direction_curvature"):
        torch.testing.assert_close(row[name], again[name], rtol=0, atol=0, equal_nan=True)
        assert not any(torch.equal(row[name], other[name]) for other in others), name


def test_it_measures_at_the_snapshots_parameters_though_the_model_has_moved_on():
    case = copy.deepcopy(case_of("layernorm"))
    snapshot = snapshot_of(case)
    before = probe().measure(snapshot)
    case.partition.assign(case.problem.model, snapshot.parameters + 1)
    after = probe().measure(snapshot)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


def test_without_an_update_its_own_entries_are_not_numbers_and_no_others():
    row = probe().measure(replace(snapshot_of(case_of("mlp_classifier")), update=None))
    i, k = DIRECTIONS.index("update"), LADDER_DIRECTIONS.index("update")
    for name in ("direction_norm", "direction_slope", "direction_curvature"):
        missing = torch.zeros_like(row[name], dtype=torch.bool)
        missing[..., i] = True
        assert torch.equal(row[name].isnan(), missing), name
    for name in ("change", "beyond_second_order", "linearisation", "linearisation_stderr"):
        assert bool(row[name][k].isnan().all()) and bool(row[name][1 - k].isfinite().all()), name
    assert all(bool(torch.as_tensor(row[name]).isfinite().all()) for name in ("fro2", "trace", "gn_gap"))


def test_a_step_that_was_rejected_changes_nothing_and_has_no_direction():
    snapshot = snapshot_of(case_of("mlp_classifier"))
    assert snapshot.update is not None
    row = probe().measure(replace(snapshot, update=0 * snapshot.update))
    i, k = DIRECTIONS.index("update"), LADDER_DIRECTIONS.index("update")
    assert float(row["direction_norm"][i]) == 0 and bool(row["direction_slope"][i].isnan())
    assert not row["change"][k].any() and not row["linearisation"][k].any()
    assert bool(row["direction_curvature"][:, DIRECTIONS.index("random")].isfinite().all())


def test_at_zero_gradient_the_matrices_are_measured_all_the_same():
    """Targets are the model's own outputs: g = 0 and R = 0, and there is no gradient or Gauss-Newton direction."""
    case = copy.deepcopy(case_of("mlp_regression"))
    batches = [(x, case.problem.model(x).detach()) for x, _ in case.problem.batches]
    row = probe().measure(replace(snapshot_of(case), batches=batches))
    assert float(row["loss"]) == 0 and float(row["gn_gap"]) == 0
    assert row["gauss_newton_step_iterations"] == 0 and float(row["gauss_newton_step_residual"]) == 0
    where = [DIRECTIONS.index(name) for name in ("negative_gradient", "gauss_newton_step")]
    assert bool(row["direction_slope"][where].isnan().all())
    assert bool(row["direction_curvature"][0, DIRECTIONS.index("update")] > 0)


def test_an_unfinished_solve_is_stored_with_its_residual():
    case = case_of("decoder")
    row = probe(cg_iterations=2, damping=1e-3).measure(snapshot_of(case))
    assert row["gauss_newton_step_iterations"] == 2
    assert 0.01 < float(row["gauss_newton_step_residual"]) < 10
    assert bool(row["change"].isfinite().all())


def test_one_sequence_has_no_error_over_sequences_and_everything_else():
    case = case_of("decoder")
    (x, y) = case.problem.batches[0]
    row = probe(cg_iterations=3).measure(replace(snapshot_of(case), batches=[(x[:1], y[:1])]))
    assert row["sequences"] == 1
    assert bool(row["linearisation_stderr"].isnan().all()) and bool(row["linearisation"].isfinite().all())
    assert bool(row["gn_gap_stderr"].isfinite())


def test_a_failing_row_says_why_and_the_next_one_is_measured(tmp_path, monkeypatch):
    case = copy.deepcopy(case_of("mlp_classifier"))
    instrument, good = probe(), snapshot_of(case)
    real = GaussNewton._apply
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [instrument], case.partition, steps=2 * instrument.every)
        monkeypatch.setattr(GaussNewton, "_apply", lambda self, v, *rest: torch.full_like(v, torch.nan))
        failure = held.record(instrument, replace(good, step=0)).failure
        assert "not finite" in failure
        monkeypatch.setattr(GaussNewton, "_apply", real)
        assert held.record(instrument, replace(good, step=instrument.every)).failure == ""


# -- cost --------------------------------------------------------------------------------------------------


def test_a_row_costs_what_was_foreseen_less_the_iterations_saved():
    case = case_of("decoder")
    instrument = probe(cg_iterations=50, cg_tolerance=0.1)
    row = instrument.measure(snapshot_of(case))
    saved = 50 - row["gauss_newton_step_iterations"]
    assert saved > 10 and saved == int(saved)
    assert instrument.cost(case.partition) - row["gradient_equivalents"] == pytest.approx(saved * 4 / 3)


def test_richer_presets_cost_more_and_hold_more():
    partition = case_of("decoder").partition
    instruments = [GNHessianProbe(GNHessianRecipe(preset=p)) for p in ("light", "standard", "deep")]  # type: ignore[arg-type]
    costs = [instrument.cost(partition) for instrument in instruments]
    assert costs[0] < costs[1] / 2 < costs[2] / 4
    vectors = [instrument.vectors(partition) for instrument in instruments]
    assert vectors[0] < vectors[1] < vectors[2]
    # A small memory takes the Krylov spaces one start at a time.
    small = without_memory(instruments[2])
    assert small.vectors(partition) < vectors[2] / 3


def without_memory(instrument: GNHessianProbe) -> GNHessianProbe:
    found = GNHessianProbe(instrument.recipe)
    found._memory = 1
    return found


def test_a_recipe_builds_it():
    recipe = Recipe(probes=("gn_hessian",), gn_hessian=GNHessianRecipe(every=5))
    (instrument,) = build_probes(recipe)
    assert isinstance(instrument, GNHessianProbe) and instrument.every == 5
    assert PreconditionerRecipe().every  # the recipe's other section is not needed for it
