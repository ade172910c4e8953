"""The inner problem's value and gradient are those of the dense model of the loss, whole and block by block."""

from __future__ import annotations

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.optimization.local_model import local_gradient, predicted_decrease
from tests.cases import Case
from tests.optimization.linearised import displacement, inside, linearised_loss, named, single
from tests.oracles import relative_error

NAMES = ("mlp_regression", "mlp_classifier", "layernorm", "repeated_module", "frozen_layer", "custom_loss",
         "decoder", "decoder_swiglu_layernorm", "decoder_tied", "fused_attention")  # fmt: skip
SPLIT = ("layernorm", "decoder")
PARTITIONS = ("layer", "module", "parameter")


def found(case: Case, delta: torch.Tensor, names: tuple[str, ...], model: str):
    """Returns (value, gradient (p,)), zero outside `names`, of the model of the loss on the only batch."""
    theta = named(case, case.partition.vector(case.problem.model))
    local = local_gradient(
        case.objective, case.problem.batches[0], theta, named(case, delta), names, model=model
    )
    assert set(local.gradient) == set(names)
    blank = {name: torch.zeros_like(value) for name, value in theta.items()}
    return local.value, case.partition.flatten({**blank, **local.gradient})


@pytest.mark.parametrize("name", NAMES)
def test_the_quadratic_model_is_loss_gradient_and_gauss_newton(name):
    case = single(name)
    truth, delta = case.truth, displacement(case)
    value, gradient = found(case, delta, case.partition.names, "quadratic")
    curved = truth.gauss_newton @ delta
    assert relative_error(gradient, truth.gradient + curved) < 1e-10
    wanted = truth.loss + truth.gradient @ delta + 0.5 * delta @ curved
    assert abs(value - float(wanted)) < 1e-10 * abs(float(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_the_prox_linear_model_is_the_loss_of_the_linearised_network(name):
    case = single(name)
    delta = displacement(case).requires_grad_()
    wanted = linearised_loss(case)(delta)
    (slope,) = torch.autograd.grad(wanted, delta)
    value, gradient = found(case, delta.detach(), case.partition.names, "prox-linear")
    assert relative_error(gradient, slope) < 1e-10
    assert abs(value - float(wanted.detach())) < 1e-10 * abs(float(wanted.detach()))


@pytest.mark.filterwarnings("ignore:layer partition")
@pytest.mark.parametrize("by", PARTITIONS)
@pytest.mark.parametrize("name", SPLIT)
def test_a_block_has_its_own_quadratic_with_the_others_at_theta(name, by):
    case = single(name).split(by)
    truth, delta = case.truth, displacement(case)
    for block, where in case.partition.slices.items():
        names, own = case.partition.parameters_of(block), inside(case, delta, block)
        # The whole delta is handed in: entries outside the block must not matter.
        value, gradient = found(case, delta, names, "quadratic")
        wanted = truth.gradient[where] + truth.gauss_newton[where, where] @ delta[where]
        assert relative_error(gradient[where], wanted) < 1e-10
        model = truth.loss + truth.gradient @ own + 0.5 * own @ truth.gauss_newton @ own
        assert abs(value - float(model)) < 1e-10 * float(model)


@pytest.mark.filterwarnings("ignore:layer partition")
@pytest.mark.parametrize("by", PARTITIONS)
@pytest.mark.parametrize("name", SPLIT)
def test_a_block_has_its_own_linearised_loss_with_the_others_at_theta(name, by):
    case = single(name).split(by)
    delta, loss = displacement(case), linearised_loss(case)
    for block, where in case.partition.slices.items():
        own = inside(case, delta, block).requires_grad_()
        (slope,) = torch.autograd.grad(loss(own), own)
        _, gradient = found(case, delta, case.partition.parameters_of(block), "prox-linear")
        assert relative_error(gradient[where], slope[where]) < 1e-10


def test_a_parameter_that_the_outputs_do_not_depend_on_has_gradient_zero(generator):
    class Spare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    from tests.models import Problem, labels, real, redraw

    g = generator(5)
    case = Case.on(Problem(redraw(Spare(), g), [(real(g, 4, 3), labels(g, 2, 4))], "cross_entropy"))
    _, gradient = found(case, displacement(case), case.partition.names, "quadratic")
    assert not gradient[case.partition.slices["spare"]].any()
    assert gradient[case.partition.slices["used"]].any()


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


def test_measuring_leaves_the_model_as_it_was(zoo_case):
    case = zoo_case("decoder_ragged")
    model = case.problem.model
    model.train()
    before = case.partition.vector(model)
    theta, delta = named(case, before), named(case, displacement(case))
    local_gradient(
        case.objective, case.problem.batches[0], theta, delta, case.partition.names, model="quadratic"
    )
    predicted_decrease(case.objective, case.problem.batches, theta, delta, model="quadratic")
    assert torch.equal(case.partition.vector(model), before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_unknown_model_of_the_loss_is_named_with_the_valid_ones(zoo_case):
    case = zoo_case("mlp_classifier")
    theta = named(case, case.partition.vector(case.problem.model))
    with pytest.raises(UserError, match="no model of the loss named 'cubic'.*quadratic, prox-linear"):
        local_gradient(
            case.objective, case.problem.batches[0], theta, theta, case.partition.names, model="cubic"
        )
