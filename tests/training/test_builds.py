"""From a recipe to the parts of a run, and a log that says where its numbers come from."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.machine.devices import pick_device
from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.inner_problem import GaussNewtonSettings
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import OPTIMIZERS, OptimizerRecipe, build_recipe, read_recipe
from hessprobe.training.builds import build_model, decoder_config
from hessprobe.training.loop import train
from hessprobe.training.optimizers import (
    INNER_LEARNING_RATES,
    LEARNING_RATES,
    build_optimizer,
    build_warmup,
    learning_rate,
)
from hessprobe.training.train_row import Totals, layout, train_row
from tests.training.runs import attributes, recipe, text_file
from tests.training.step_reports import report

CPU = torch.device("cpu")


def built(*settings: str):
    """Returns the optimizer of a tiny recipe, and the recipe."""
    chosen = build_recipe({}, ["model.layers=1", "model.width=8", "model.heads=2", *settings])
    objective = Objective(build_model(chosen, CPU))
    return build_optimizer(chosen.optimizer, objective, Partition.of(objective.model), 7), chosen


def test_a_device_that_is_not_there_is_told_with_those_that_are():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")
    for wanted in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {wanted}: .*this machine has auto, cpu"):
            pick_device(wanted)


def test_a_size_is_a_start_that_the_recipes_own_numbers_change():
    chosen = build_recipe(read_recipe("nano"), ["model.layers=2", "model.mlp=swiglu"])
    config = decoder_config(chosen)
    assert (config.layers, config.width, config.mlp, config.vocabulary) == (2, 64, "swiglu", 256)
    with pytest.raises(UserError, match="heads must split width 64"):
        decoder_config(build_recipe({}, ["model.heads=3"]))


def test_initial_weights_depend_on_the_seed_alone():
    one, two, other = (build_model(build_recipe({}, [f"seed={seed}"]), CPU) for seed in (1, 1, 2))
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.head.weight, other.head.weight)


STRUCTURES = {
    "full_gn": ("quadratic", "full"),
    "layerwise_gn": ("quadratic", "layerwise"),
    "prox_linear": ("prox-linear", "full"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_a_recipe_can_be_built(name):
    optimizer, _ = built(f"optimizer.name={name}")
    if name in STRUCTURES:
        assert isinstance(optimizer, GaussNewton)
        assert optimizer.settings.learning_rate == LEARNING_RATES[name]
        assert (optimizer.settings.model, optimizer.settings.structure) == STRUCTURES[name]
        assert len(optimizer.grid) == (10 if name == "layerwise_gn" else 5)
    else:
        assert isinstance(optimizer, FirstOrderOptimizer)
        assert optimizer.learning_rate == LEARNING_RATES[name]


def test_a_recipes_settings_reach_gauss_newton():
    optimizer, _ = built(
        "optimizer.name=prox_linear", "optimizer.structure=layerwise", "optimizer.learning_rate=0.5",
        "optimizer.inner_solver=adamw", "optimizer.line_search_grid=3", "optimizer.inner_steps=5",
        "optimizer.warm_start=false", "optimizer.schedule=inner-cosine", "optimizer.clip=2", "optimizer.damping=0.3",
    )  # fmt: skip
    assert isinstance(optimizer, GaussNewton)
    settings = optimizer.settings
    assert (settings.learning_rate, settings.solver, settings.clip) == (0.5, "adamw", 2.0)
    assert (settings.warm_start, settings.schedule, settings.outer_steps) == (False, "inner-cosine", 7)
    assert (settings.model, settings.structure) == ("prox-linear", "layerwise")
    assert (settings.inner_steps, settings.damping, len(optimizer.grid)) == (5, 0.3, 3)


def test_conjugate_gradients_take_their_settings_and_defaults():
    optimizer, _ = built(
        "optimizer.inner_solver=cg", "optimizer.cg_iterations=7", "optimizer.cg_tolerance=0.1"
    )
    assert isinstance(optimizer, GaussNewton)
    assert (optimizer.settings.solver, optimizer.settings.cg_iterations) == ("cg", 7)
    assert optimizer.settings.cg_tolerance == 0.1
    default, _ = built("optimizer.inner_solver=cg")
    assert isinstance(default, GaussNewton)
    assert default.settings.cg_iterations == GaussNewtonSettings().cg_iterations


def test_an_inner_solver_brings_its_own_default_learning_rate():
    rates = {
        solver: learning_rate(OptimizerRecipe(inner_solver=solver)) for solver in ("muon", "adamw", "soap")
    }
    assert rates["muon"] == LEARNING_RATES["full_gn"] == 0.02
    assert rates == INNER_LEARNING_RATES
    assert learning_rate(OptimizerRecipe(inner_solver="soap", learning_rate=0.7)) == 0.7


def test_a_recipes_settings_reach_a_baseline():
    optimizer, _ = built(
        "optimizer.name=soap", "optimizer.refresh=3", "optimizer.learning_rate_warmup=4", "optimizer.damping=0.5"
    )  # fmt: skip
    assert isinstance(optimizer, FirstOrderOptimizer)
    assert optimizer.learning_rate_warmup == 4
    # What an optimizer has no use for is let be, so that one recipe serves several.
    built("optimizer.name=adamw", "optimizer.refresh=3", "optimizer.damping=0.5", "optimizer.cg_iterations=9")


def test_clip_0_does_not_clip():
    optimizer, _ = built("optimizer.name=full_gn", "optimizer.clip=0")
    assert isinstance(optimizer, GaussNewton) and optimizer.settings.clip is None
    baseline, chosen = built("optimizer.name=adamw", "optimizer.clip=0")
    assert isinstance(baseline, FirstOrderOptimizer) and baseline.clip is None
    warmup = build_warmup(chosen.optimizer, baseline.objective, baseline.partition)
    assert warmup.clip is None and not warmup.accumulate


def test_a_log_says_where_its_numbers_come_from(tmp_path):
    folder = tmp_path / "run"
    chosen = recipe(folder, "training.steps=1", "optimizer.name=adamw", "seed=5")
    train(chosen, folder)
    found = attributes(folder)
    assert build_recipe(json.loads(found["recipe"])) == chosen
    assert build_recipe(read_recipe(folder / "recipe.toml")) == chosen
    assert (found["seed"], found["name"]) == (5, "run")
    assert {"hessprobe", "torch", "python", "xarray", "zarr"} <= set(json.loads(found["versions"]))
    data = json.loads(found["data"])
    assert data["source"] == str(text_file(tmp_path)) and len(data["sha256"]) == 64
    assert list(json.loads(found["partition"])) == ["embedding", "block.0", "head"]
    assert found["created"].endswith("+00:00") and found["device"].startswith("cpu")
    assert {"git_commit", "schema_version"} <= set(found)
    assert (found["float32_matmul"], found["autocast"], found["deterministic"]) == ("float32", "none", 0)


def test_a_training_row_is_what_its_table_declares():
    chosen = OptimizerRecipe(line_search_grid=3, minibatches=4)
    table = layout(chosen)
    row = train_row(
        report(
            line_search_loss={1.0: 4.0, 0.5: 3.0}, inner_loss=(5.0, 4.5), predicted_decrease=0.4,
            actual_decrease=0.3, inner_iterations=2, outcome="accepted after 1 retry at learning rate 0.005",
        ),
        Totals(tokens=8), chosen, held_out_loss=5.2, peak_memory=1.0,
    )  # fmt: skip
    assert set(row) == {variable.name for variable in table.variables}
    assert row["line_search_loss"][0] == 4.0 and len(row["line_search_loss"]) == 3
    assert (row["inner_loss_first"], row["inner_loss_last"], row["tokens"]) == (5.0, 4.5, 8)
    np.testing.assert_array_equal(row["inner_loss"], [5.0, 4.5, np.nan, np.nan])
    assert row["outcome"] == "accepted after 1 retry at learning rate 0.005"
    assert (row["decrease_ratio"], row["inner_iterations"]) == (pytest.approx(0.75), 2)
    assert np.isnan(row["inner_residual"])


def test_a_decrease_that_was_not_promised_has_no_ratio():
    chosen = OptimizerRecipe()
    for promised in (0.0, math.nan):
        made = report(predicted_decrease=promised, actual_decrease=0.1)
        row = train_row(made, Totals(), chosen, held_out_loss=1.0, peak_memory=1.0)
        assert np.isnan(row["decrease_ratio"])


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"minibatches": 4}, 4),
        ({"minibatches": 4, "inner_steps": 9}, 9),
        ({"minibatches": 4, "inner_steps": 2}, 4),  # the warm-up takes a step on each minibatch
        ({"minibatches": 4, "inner_steps": 2, "warmup_steps": 0}, 2),
        ({"inner_solver": "cg", "warmup_steps": 0}, 2),
        ({"name": "adamw", "minibatches": 4, "warmup_steps": 0}, 1),
    ],
)
def test_the_inner_trace_has_a_place_for_every_inner_step(settings, places):
    chosen = OptimizerRecipe(**settings)
    assert list(layout(chosen).coordinates["inner_step"]) == list(range(places))


def test_totals_add_up():
    totals = Totals()
    for _ in range(3):
        totals.add(report(tokens=8, line_search_tokens=4, gradient_equivalents=2.5), 0.5)
    assert totals == Totals(tokens=24, line_search_tokens=12, seconds=1.5, gradient_equivalents=7.5)
