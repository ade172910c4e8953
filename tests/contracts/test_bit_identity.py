"""A run is a function of its recipe alone: the same twice, another for another seed, and blind to being measured."""

from __future__ import annotations

import pytest
import torch

from hessprobe.instruments.cross_layer.measure.probe import CrossLayerProbe
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import CrossLayerRecipe
from hessprobe.training.loop import train
from tests import models
from tests.training.runs import assert_same_rows, parameters, recipe, state, tables

MEASURED = 'probes=["cross_layer"]'


@pytest.mark.parametrize(("optimizer", "method"), [("full_gn", "kernels"), ("adamw", "products")])
def test_training_ends_in_the_same_weights_with_and_without_a_probe(tmp_path, optimizer, method):
    settings = (
        f"optimizer.name={optimizer}",
        f"cross_layer.method={method}",
        "training.steps=4",
        "cross_layer.every=1",
    )
    for folder, more in (("bare", ()), ("probed", (MEASURED,))):
        train(recipe(tmp_path / folder, *settings, *more), tmp_path / folder)
    bare, probed = state(tmp_path / "bare"), state(tmp_path / "probed")
    assert torch.equal(bare["parameters"], probed["parameters"])
    torch.testing.assert_close(bare["optimizer"], probed["optimizer"], rtol=0, atol=0)
    assert set(tables(tmp_path / "bare")) == {"train"}
    assert tables(tmp_path / "probed")["cross_layer"].sizes["step"] == 4


SMALL = (
    "gn_hessian.every=1", "gn_hessian.sequences=4", "gn_hessian.samples=2", "gn_hessian.lanczos_steps=3",
    "gn_hessian.cg_iterations=3", "preconditioner.every=1", "preconditioner.curvature_sequences=[4]",
    "preconditioner.held_out_sequences=4", "preconditioner.cg_iterations=3", "preconditioner.condition_steps=2",
)  # fmt: skip


@pytest.mark.parametrize("optimizer", ["full_gn", "soap", "kfac"])
def test_all_instruments_together_leave_training_as_it_is_and_measure_the_same_twice(tmp_path, optimizer):
    """Also where the preconditioner probe answers from the running optimizer's own state."""
    settings = (f"optimizer.name={optimizer}", "training.steps=2", "cross_layer.every=1", *SMALL)
    everything = 'probes=["cross_layer","gn_hessian","preconditioner"]'
    for seed, (folder, more) in enumerate(
        (("bare", ()), ("probed", (everything,)), ("again", (everything,)))
    ):
        torch.manual_seed(seed)
        train(recipe(tmp_path / folder, *settings, *more), tmp_path / folder)
        assert torch.initial_seed() == seed
    bare, probed = state(tmp_path / "bare"), state(tmp_path / "probed")
    assert torch.equal(bare["parameters"], probed["parameters"])
    torch.testing.assert_close(bare["optimizer"], probed["optimizer"], rtol=0, atol=0)
    assert_same_rows(tmp_path / "probed", tmp_path / "again")
    for name in ("cross_layer", "gn_hessian", "preconditioner"):
        table = tables(tmp_path / "probed")[name]
        assert table.sizes["step"] == 2 and not any(table["failure"].values)
    assert not tables(tmp_path / "probed")["preconditioner"]["candidate_failure"].values.any()


def test_two_runs_of_one_recipe_are_one_and_another_seed_is_another(tmp_path):
    for folder, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(recipe(tmp_path / folder, f"seed={seed}", "training.steps=3", MEASURED), tmp_path / folder)
    assert torch.equal(parameters(tmp_path / "one"), parameters(tmp_path / "two"))
    assert_same_rows(tmp_path / "one", tmp_path / "two")
    assert not torch.equal(parameters(tmp_path / "one"), parameters(tmp_path / "other"))


def test_a_run_depends_on_no_ambient_random_state(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        train(recipe(tmp_path / f"{seed}", "training.steps=2", MEASURED), tmp_path / f"{seed}")
        assert torch.initial_seed() == seed
    assert_same_rows(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("method", ["kernels", "products"])
@pytest.mark.parametrize("name", ["decoder_ragged", "fused_attention"])
def test_one_measurement_touches_neither_weights_nor_gradients_nor_random_state(name, method):
    problem = models.ZOO[name](models.seeded(1))
    model = problem.model.train()
    objective, partition = Objective(model), Partition.of(model, "module")
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i)
    weights = {n: p.detach().clone() for n, p in model.state_dict().items()}
    identities = {n: p.data_ptr() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    theta = partition.vector(model)
    snapshot = Snapshot(
        step=0, objective=objective, partition=partition, parameters=theta, update=0.1 * theta, seed=0,
        batches=list(problem.batches),
    )  # fmt: skip
    CrossLayerProbe(CrossLayerRecipe(method=method, samples=2)).measure(snapshot)  # type: ignore[arg-type]
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    assert identities == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert all(bool((p.grad == i).all()) for i, p in enumerate(model.parameters()))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
