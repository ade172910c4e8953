"""Products from forward passes and gradients alone: near the exact ones by what they state, on any model that trains."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hessprobe as hp
from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.difference_steps import StepErrors
from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.residual import Residual
from hessprobe.errors import UserError
from tests import models
from tests.cases import Case
from tests.curvature.awkward_models import Kernel, awkward
from tests.curvature.stopping_models import Reversed, Stopped

Zoo = Callable[[str], Case]
ENGINE = "first-order"
KINDS = {"gauss_newton": hp.GaussNewton, "hessian": hp.Hessian, "residual": Residual}
# Of the error stated for one direction, what other directions, other rows and more sequences may have.
OTHERS = 30
NAMES = ["decoder_ragged", "decoder_tied", "fused_attention", "layernorm", "mlp_classifier", "frozen_layer"]


def off(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest relative error of a row."""
    return float(((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def in_float32(case: Case) -> Case:
    model = copy.deepcopy(case.problem.model).float()
    batches = [(x.float() if x.is_floating_point() else x, y) for x, y in case.problem.batches]
    problem = models.Problem(model, batches, case.problem.loss)
    partition = hp.Partition.of(model, case.partition.kind)
    return Case(problem, hp.Objective(model, problem.loss), partition, as_built=case)


def made(case: Case, which: str, **options: object) -> ModelOperator:
    batches, options = case.problem.batches, {"engine": ENGINE, **options}
    return KINDS[which](case.objective, batches, case.partition, **options)  # type: ignore[arg-type]


def errors_of(operator: ModelOperator) -> StepErrors:
    assert operator.step_errors is not None
    return operator.step_errors


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_products_are_the_exact_ones_within_their_stated_error(
    zoo_case: Zoo, name: str, which: str, dtype: torch.dtype
) -> None:
    case = zoo_case(name)
    truth, rows = getattr(case.truth, which), case.rows(3)
    here = case if dtype == torch.float64 else in_float32(case)
    operator = made(here, which)
    before = [(p, p.detach().clone(), p._version) for p in here.problem.model.parameters()]
    found, errors = operator.apply(rows.to(dtype)), errors_of(operator)
    assert operator.engine == ENGINE
    assert errors.error < (1e-8 if dtype == torch.float64 else 1e-3)
    assert off(found[:1], rows[:1] @ truth) < 4 * errors.error, "along the direction that it was stated for"
    assert off(found, rows @ truth) < OTHERS * errors.error
    assert errors.exact is not None and errors.exact < 4 * errors.error
    assert errors.symmetry_gap < 10 * errors.error
    for p, (it, was, version) in zip(here.problem.model.parameters(), before, strict=True):
        assert p is it and torch.equal(p, was) and p._version == version and p.grad is None


@pytest.mark.parametrize("which", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_errors_over_steps_are_the_stated_ones(zoo_case: Zoo, which: str, dtype: torch.dtype) -> None:
    case = zoo_case("decoder")
    here = case if dtype == torch.float64 else in_float32(case)
    operator, row = made(here, which), case.rows(1)
    operator.apply(row.to(dtype))
    errors, truth = errors_of(operator), row @ getattr(case.truth, which)
    v = here.partition.unflatten(row[0].to(dtype))
    for distance, stated in zip(errors.distances, errors.errors, strict=True):
        found = torch.zeros_like(row)
        for batch in operator.pieces:
            e = distance / float(row.norm())
            part = operator._by_differences(batch, v, e, case.partition.names)
            found += here.partition.flatten(dict(part)).double()
        measured = off(found, truth)
        assert stated / 4 < measured < 4 * stated, (distance, stated, measured)
    assert errors.error <= 1.01 * min(errors.errors)
    assert max(errors.errors) > 10 * errors.error, "steps from too small to too large"


def test_steps_follow_the_direction_and_not_its_length(zoo_case: Zoo) -> None:
    case = zoo_case("decoder")
    values, vectors = torch.linalg.eigh(case.truth.gauss_newton)
    operator = made(case, "gauss_newton")
    operator.apply(case.rows(1))
    stated = errors_of(operator).error
    steep = vectors[:, -1:].T.contiguous()
    for scale in (1e-12, 1.0, 1e12):
        assert off(operator.apply(scale * steep), scale * values[-1] * steep) < OTHERS * stated
    assert operator.first_order.measure_steps(steep[0]) == errors_of(operator)
    assert off(operator.apply(steep), values[-1] * steep) < 4 * errors_of(operator).error


@pytest.mark.parametrize("which", ["gauss_newton", "hessian"])
def test_blocks_rows_that_are_zero_and_rows_that_are_not_finite(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_ragged")
    operator, truth = made(case, which), getattr(case.truth, which)
    rows = case.rows(3)
    rows[1], rows[2, 0] = 0, torch.nan
    first, last = case.partition.blocks[0], case.partition.blocks[-1]
    a, b = case.partition.slices[first], case.partition.slices[last]
    found = operator.apply(rows, columns=[first], rows=[last])
    assert off(found[:1, b], rows[:1, a] @ truth[a, b]) < 1e-7
    assert not found[1].any() and found[2, b].isnan().all()
    found[:, b] = 0
    assert not found.any()
    blocks = torch.block_diag(*[truth[where, where] for where in case.slices])
    assert off(operator.block_diagonal().apply(rows[:1]), rows[:1] @ blocks) < 1e-7
    assert off(operator.linearised(2**28).apply(rows[:1]), rows[:1] @ truth) < 1e-7  # type: ignore[attr-defined]


def test_slopes_and_curvatures_along_directions(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_ragged")
    found = curvature_along(made(case, "gauss_newton"), case.rows(2), folds=2)  # type: ignore[arg-type]
    wanted = curvature_along(case.gauss_newton(), case.rows(2), folds=2)
    assert off(found.slope.flatten(1), wanted.slope.flatten(1)) < 1e-7
    assert off(found.curvature.flatten(1), wanted.curvature.flatten(1)) < 1e-7


def test_other_parameters_than_the_models_own(zoo_case: Zoo) -> None:
    case = zoo_case("decoder")
    theta = case.partition.vector(case.problem.model) + 0.1 * case.rows(1, seed=4)[0]
    for which in ("gauss_newton", "hessian"):
        wanted = made(case, which, engine="exact", parameters=theta).apply(case.rows(1))
        assert off(made(case, which, parameters=theta).apply(case.rows(1)), wanted) < 1e-7


# -- where there is no second derivative --------------------------------------------------------------------


class Recomputed(nn.Module):
    """A checkpoint of the old kind, whose backward pass cannot be asked for some gradients alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(6, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, self.first(x), use_reentrant=True))


class Plain(nn.Module):
    """The same as Kernel and Recomputed by operations that torch differentiates as often as asked."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = (of,)
        for name, part in of.named_children():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        of = self.of[0]
        if isinstance(of, Kernel):
            return of.head(of.body(x).tanh())
        return of.head(of.body(of.first(x)))  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Kernel, Recomputed])
@pytest.mark.parametrize("which", KINDS)
def test_models_without_second_derivatives_are_measured_and_say_how(
    generator: Callable[[int], torch.Generator], which: str, kind: type[nn.Module]
) -> None:
    case = awkward(kind, generator)
    rows = case.rows(2)
    plain = Case.on(models.Problem(Plain(copy.deepcopy(case.problem.model)), *case.problem[1:]))
    wanted = rows @ getattr(plain.truth, which)
    operator = made(case, which, engine="auto")
    with pytest.warns(UserWarning, match="no second derivatives.*'first-order'.*error of about"):
        found = operator.apply(rows)
    assert operator.engine == ENGINE and errors_of(operator).exact is None
    assert off(found, wanted) < OTHERS * errors_of(operator).error
    assert off(operator.apply(rows), wanted) < OTHERS * errors_of(operator).error  # and warns no more
    with pytest.raises((UserError, RuntimeError), match="(?i)differentia|symmetr|derivative|use_reentrant"):
        made(case, which, engine="exact").apply(rows)


def test_models_with_second_derivatives_are_measured_as_before(zoo_case: Zoo) -> None:
    case = zoo_case("decoder")
    for which, engine in (("gauss_newton", "forward-mode"), ("hessian", "forward-over-reverse")):
        operator = made(case, which, engine="auto")
        operator.apply(case.rows(1))
        assert operator.engine == engine and operator.step_errors is None


def test_a_backward_pass_that_is_not_the_derivative_is_refused() -> None:
    torch.manual_seed(0)
    model = Stopped(Reversed.apply).double()  # type: ignore[arg-type]
    x = torch.randint(8, (3, 5))
    partition = hp.Partition.of(model)
    for kind in (hp.GaussNewton, hp.Hessian):
        with pytest.raises(UserError, match="not symmetric.*not the derivative of its forward pass"):
            kind(hp.Objective(model), (x, x.flip(1)), partition, engine=ENGINE).apply(
                torch.randn(1, partition.size, dtype=torch.float64, generator=models.seeded(1))
            )


def test_attention_keeps_its_fused_kernel(zoo_case: Zoo) -> None:
    case, taken = zoo_case("fused_attention"), set[str]()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            taken.add(str(func))
            return func(*args, **(kwargs or {}))

    operator = made(case, "gauss_newton")
    operator.apply(case.rows(1))
    with Watched():
        operator.apply(case.rows(1))
    assert {name for name in taken if "flash" in name} == {
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    }


# Of torch's own tracing, which looks at every tensor's .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("part", ["whole", "part"])
def test_compiled_models(zoo_case: Zoo, part: str) -> None:
    case, ran = zoo_case("mlp_classifier"), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        def run(*values: object) -> object:
            ran.append(1)
            return graph.forward(*values)

        return run

    model = copy.deepcopy(case.problem.model)
    if part == "whole":
        model.compile(backend=backend)
    else:
        model[0].compile(backend=backend)  # type: ignore[index]
    objective, partition = hp.Objective(model), hp.Partition.of(model, "module")
    try:
        for which in ("gauss_newton", "hessian"):
            operator = KINDS[which](objective, case.problem.batches, partition, engine=ENGINE)
            found = operator.apply(case.rows(1))
            assert off(found, case.rows(1) @ getattr(case.truth, which)) < 4 * errors_of(operator).error
            ran.clear()
            operator.apply(case.rows(1))
            assert ran, "products are from the compiled code"
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [hp.GaussNewton, hp.Hessian])
def test_half_precision_is_refused_and_the_way_out_is_one(
    zoo_case: Zoo, kind: type, dtype: torch.dtype
) -> None:
    case = zoo_case("decoder_ragged")
    model = copy.deepcopy(case.problem.model).to(dtype)
    objective, partition, batches = hp.Objective(model), hp.Partition.of(model), case.problem.batches
    with pytest.raises(
        UserError, match=r"16.*rounding alone.*parameters=partition.vector\(model\).float\(\)"
    ):
        kind(objective, batches, partition, engine=ENGINE)
    operator = kind(objective, batches, partition, engine=ENGINE, parameters=partition.vector(model).float())
    operator.apply(case.rows(1).float())
    assert errors_of(operator).error < 1e-3


class Rounded(nn.Module):
    """Computes in bfloat16, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).bfloat16().tanh().to(x.dtype))


def test_half_precision_inside_the_model_is_in_the_stated_error(
    generator: Callable[[int], torch.Generator],
) -> None:
    class Plain(Rounded):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh())

    plain = awkward(Plain, generator)
    case, rows = in_float32(awkward(Rounded, generator)), plain.rows(1)
    operator = made(case, "gauss_newton")
    found = operator.apply(rows.float())
    assert 1e-3 < errors_of(operator).error < 0.1
    assert off(found, rows @ plain.truth.gauss_newton) < 4 * errors_of(operator).error
