"""Measuring takes the model as training left it, switches off what it must, and puts everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda as attention

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case, pair

EXACT = 1e-10
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]
OPERATORS = ("gauss_newton", "hessian")


# -- attention kernels -------------------------------------------------------------------------------------


def _kernels() -> dict[str, bool]:
    return {
        "flash": attention.flash_sdp_enabled(),
        "efficient": attention.mem_efficient_sdp_enabled(),
        "math": attention.math_sdp_enabled(),
        "cudnn": attention.cudnn_sdp_enabled(),
    }


@pytest.fixture
def kernels_as_found() -> Iterator[None]:
    before = _kernels()
    yield
    attention.enable_flash_sdp(before["flash"])
    attention.enable_mem_efficient_sdp(before["efficient"])
    attention.enable_math_sdp(before["math"])
    attention.enable_cudnn_sdp(before["cudnn"])


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("which", OPERATORS)
def test_the_choice_of_attention_kernels_is_restored(
    zoo_case: Zoo, kernels_as_found: None, which: str, flash: bool
) -> None:
    case = zoo_case("fused_attention")
    attention.enable_flash_sdp(flash)
    attention.enable_math_sdp(not flash)
    before = _kernels()
    operator, truth = pair(case, which)
    v = case.rows(2)
    assert oracles.relative_error(operator.apply(v), v @ truth) < EXACT
    assert _kernels() == before


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout = nn.Linear(3, 4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim:
            raise RuntimeError("the model's own failure")
        return self.body(self.dropout(x))


@pytest.mark.parametrize("which", OPERATORS)
def test_a_model_that_fails_raises_its_own_error_and_everything_is_restored(
    generator: Seeded, which: str
) -> None:
    model = models.redraw(Failing(), generator(1)).train()
    before = _kernels()
    partition = Partition.of(model, "module")
    batch = (models.real(generator(2), 5, 3), models.labels(generator(3), 4, 5))
    kind = {"gauss_newton": GaussNewton, "hessian": Hessian}[which]
    with pytest.raises(RuntimeError, match="the model's own failure"):
        kind(Objective(model), [batch], partition).apply(torch.zeros(1, partition.size, dtype=torch.float64))
    assert _kernels() == before
    assert all(module.training for module in model.modules())


# -- compiled models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_classifier", "decoder_tied"])
def test_a_compiled_model_gives_the_products_of_the_model_inside(generator: Seeded, name: str) -> None:
    problem = models.ZOO[name](generator(31))
    plain = Case.on(problem)
    compiled_model = torch.compile(problem.model, backend="eager")
    with torch.no_grad():
        compiled_model(problem.batches[0][0])  # compiled for real before it is measured
    partition = Partition.of(compiled_model, "module")  # type: ignore[arg-type]
    assert partition == plain.partition
    compiled = Case(problem, Objective(compiled_model), partition, as_built=plain)  # type: ignore[arg-type]
    v = plain.rows(2)
    for which in OPERATORS:
        operator, truth = pair(compiled, which)
        assert oracles.relative_error(operator.apply(v), v @ truth) < EXACT


def test_a_model_with_a_compiled_part_gives_the_right_products(generator: Seeded) -> None:
    draws = generator(32)
    model = models.redraw(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), draws)
    problem = models.Problem(model, [(models.real(draws, 5, 4), models.labels(draws, 4, 5))], "cross_entropy")
    case = Case.on(problem)
    v = case.rows(2)
    model[1].compile(backend="eager")  # type: ignore[index]
    with torch.no_grad():
        model(problem.batches[0][0])
    for which in OPERATORS:
        operator, truth = pair(case, which)
        assert oracles.relative_error(operator.apply(v), v @ truth) < EXACT


# -- training mode, random numbers, gradients --------------------------------------------------------------


def in_training(generator: Seeded) -> Case:
    """A model mid-training: dropout on, one part in eval by hand, gradients waiting for the optimizer."""
    draws = generator(33)
    layers = (
        nn.Linear(4, 6),
        nn.Dropout(0.5),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(6, 4),
    )
    model = models.redraw(nn.Sequential(*layers), draws)
    problem = models.Problem(model, [(models.real(draws, 6, 4), models.labels(draws, 4, 6))], "cross_entropy")
    model[2].running_mean.copy_(models.real(draws, 6))  # type: ignore[index]
    case = Case.on(problem)
    model.train()
    model[4].eval()  # type: ignore[index]
    for parameter in model.parameters():
        parameter.grad = models.real(draws, *parameter.shape)
    return case


@pytest.mark.parametrize("which", OPERATORS)
def test_dropout_and_batch_statistics_are_off_while_measuring(generator: Seeded, which: str) -> None:
    case = in_training(generator)
    operator, truth = pair(case, which)
    v = case.rows(3)
    assert oracles.relative_error(operator.apply(v), v @ truth) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_a_product_leaves_no_trace_in_the_model(generator: Seeded, which: str) -> None:
    case = in_training(generator)
    model = case.problem.model
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [
        (parameter.grad, parameter.grad.clone())
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    random_state = torch.get_rng_state()
    hooks = [(len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()]

    operator, _ = pair(case, which)
    operator.apply(case.rows(3))
    operator.apply(case.rows(3), rows=[case.partition.blocks[0]])

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    found = [parameter.grad for parameter in model.parameters()]
    assert len(gradients) == len(found)
    for now, (tensor, values) in zip(found, gradients, strict=True):
        assert now is tensor
        assert torch.equal(tensor, values)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hooks == [(len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()]


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("which", OPERATORS)
def test_products_are_the_same_with_and_without_the_callers_gradients(
    zoo_case: Zoo, which: str, context: Callable
) -> None:
    case = zoo_case("mlp_classifier")
    v = case.rows(2)
    with context():
        operator, truth = pair(case, which)
        product = operator.apply(v)
    assert oracles.relative_error(product, v @ truth) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_products_ignore_the_callers_autocast(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    v = case.rows(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator, truth = pair(case, which)
        product = operator.apply(v)
    assert oracles.relative_error(product, v @ truth) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_a_vector_that_wants_gradients_does_not_make_the_product_want_them(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    operator, truth = pair(case, which)
    product = operator.apply(case.rows(2).requires_grad_())
    assert not product.requires_grad
    assert oracles.relative_error(product, case.rows(2) @ truth) < EXACT
