"""The inner problem's value and gradient are those of the dense model of the loss, whole and by groups of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.optimization.group_models import LocalModels
from hessprobe.optimization.inner_problem import groups_of
from hessprobe.optimization.local_model import predicted_decrease
from tests.cases import Case
from tests.models import Problem, labels, real, redraw
from tests.optimization.linearised import (
    damped_loss,
    displacement,
    inside,
    linearised_loss,
    local_models,
    named,
    places,
    single,
    vector,
)
from tests.oracles import relative_error

NAMES = ("mlp_regression", "mlp_classifier", "layernorm", "repeated_module", "frozen_layer", "custom_loss",
         "decoder", "decoder_swiglu_layernorm", "decoder_tied", "fused_attention")  # fmt: skip
SPLIT = ("layernorm", "decoder")
PARTITIONS = ("layer", "module", "parameter", lambda name: "odd" if len(name) % 2 else "even")
MODELS = ("quadratic", "prox-linear")


def found(case: Case, delta: Tensor, groups: list[tuple[str, ...]], model: str, engine: str, damping=0.0):
    """Returns [(value, gradient (p,))] of every group of blocks on the only batch, by one of the two engines."""
    theta, batch = named(case, case.partition.vector(case.problem.model)), case.problem.batches[0]
    names = [tuple(n for block in group for n in case.partition.parameters_of(block)) for group in groups]
    models = local_models(case.objective, names, engine, model=model, damping=damping)
    local = models.gradients(batch, theta, named(case, delta))
    assert [set(one.gradient) for one in local] == [set(group) for group in names]
    return [(one.value, vector(case, one)) for one in local]


def check(case: Case, groups: list[tuple[str, ...]], model: str, engine: str, damping: float = 0.0) -> None:
    """Compares every group's value and gradient with autograd of the dense model, all other groups at theta."""
    delta, truth = displacement(case), damped_loss(case, model, damping)
    # The whole delta is handed in: entries outside the group must not matter.
    for group, (value, gradient) in zip(
        groups, found(case, delta, groups, model, engine, damping), strict=True
    ):
        own = inside(case, delta, *group).requires_grad_()
        wanted = truth(own)
        (slope,) = torch.autograd.grad(wanted, own)
        assert relative_error(gradient[places(case, group)], slope[places(case, group)]) < 1e-10
        assert abs(value - float(wanted.detach())) < 1e-10 * abs(float(wanted.detach()))


@pytest.mark.parametrize("engine", ["forward-mode", "shared"])
@pytest.mark.parametrize("name", NAMES)
def test_the_quadratic_model_is_loss_gradient_and_gauss_newton(name, engine):
    case = single(name)
    truth, delta = case.truth, displacement(case)
    ((value, gradient),) = found(case, delta, [case.partition.blocks], "quadratic", engine)
    curved = truth.gauss_newton @ delta
    assert relative_error(gradient, truth.gradient + curved) < 1e-10
    wanted = truth.loss + truth.gradient @ delta + 0.5 * delta @ curved
    assert abs(value - float(wanted)) < 1e-10 * abs(float(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_the_prox_linear_model_is_the_loss_of_the_linearised_network(name):
    case = single(name)
    check(case, [case.partition.blocks], "prox-linear", "forward-mode")


@pytest.mark.filterwarnings("ignore:layer partition")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("by", PARTITIONS, ids=[*PARTITIONS[:3], "custom"])
@pytest.mark.parametrize("name", SPLIT)
def test_a_block_has_its_own_model_with_the_others_at_theta(name, by, model):
    case = single(name).split(by)
    groups = list(groups_of("layerwise", case.partition))
    check(case, groups, model, "shared")
    if len(groups) < 5:
        check(case, groups, model, "forward-mode")


@pytest.mark.parametrize("engine", ["forward-mode", "shared"])
@pytest.mark.parametrize("model", MODELS)
def test_a_group_of_blocks_that_are_no_neighbours_has_its_own_model(model, engine):
    case = single("decoder").split("layer")
    structure = (("embedding", "head"), ("block.1",), ("block.0",))
    check(case, list(groups_of(structure, case.partition)), model, engine, damping=0.7)


@pytest.mark.parametrize("damping", [0.3, 4.0])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("structure", ["full", "layerwise"])
def test_damping_adds_its_term_and_its_gradient(model, damping, structure):
    case = single("layernorm")
    groups, engine = list(groups_of(structure, case.partition)), "shared"
    check(case, groups, model, engine, damping)
    delta, step = displacement(case), 1e-6
    for group, (_, gradient) in zip(groups, found(case, delta, groups, model, engine, damping), strict=True):
        along = inside(case, displacement(case, seed=9), *group)
        ends = [
            found(case, delta + sign * step * along, [group], model, engine, damping)[0][0]
            for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient @ along), rel=1e-6)


@pytest.mark.parametrize("engine", ["forward-mode", "shared"])
def test_a_parameter_that_the_outputs_do_not_depend_on_has_gradient_zero(generator, engine):
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    g = generator(5)
    case = Case.on(Problem(redraw(Spare(), g), [(real(g, 4, 3), labels(g, 2, 4))], "cross_entropy"))
    (_, used), (_, spare) = found(case, displacement(case), [("used",), ("spare",)], "quadratic", engine)
    assert not spare.any()
    assert used[case.partition.slices["used"]].any()


# -- what is predicted, and what stays as it was -----------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_regression", "decoder_ragged", "custom_loss"])
def test_the_predicted_decrease_is_the_models_over_all_tokens(name, zoo_case):
    case = zoo_case(name)
    truth, delta = case.truth, displacement(case, scale=0.1)
    theta = named(case, case.partition.vector(case.problem.model))

    def predicted(model: str) -> float:
        return predicted_decrease(
            case.objective, case.problem.batches, theta, named(case, delta), model=model
        )

    quadratic = -(truth.gradient @ delta + 0.5 * delta @ truth.gauss_newton @ delta)
    assert abs(predicted("quadratic") - float(quadratic)) < 1e-10 * abs(float(truth.loss))
    loss = linearised_loss(case)
    prox = float(loss(torch.zeros_like(delta)) - loss(delta))
    assert abs(predicted("prox-linear") - prox) < 1e-10 * abs(float(truth.loss))


@pytest.mark.parametrize("structure", ["full", "layerwise"])
def test_measuring_leaves_the_model_as_it_was(zoo_case, structure):
    case = zoo_case("decoder_ragged")
    model = case.problem.model
    model.train()
    before = case.partition.vector(model)
    theta, delta = named(case, before), named(case, displacement(case))
    groups = [
        tuple(n for block in group for n in case.partition.parameters_of(block))
        for group in groups_of(structure, case.partition)
    ]
    LocalModels(case.objective, groups).gradients(case.problem.batches[0], theta, delta)
    predicted_decrease(case.objective, case.problem.batches, theta, delta, model="quadratic")
    assert torch.equal(case.partition.vector(model), before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("structure", ["full", "layerwise"])
def test_an_unknown_model_of_the_loss_is_named_with_the_valid_ones(zoo_case, structure):
    case = zoo_case("mlp_classifier")
    theta = named(case, case.partition.vector(case.problem.model))
    names = case.partition.names
    groups = [names] if structure == "full" else [(n,) for n in names]
    with pytest.raises(UserError, match="no model of the loss named 'cubic'.*quadratic, prox-linear"):
        LocalModels(case.objective, groups, model="cubic").gradients(case.problem.batches[0], theta, theta)
