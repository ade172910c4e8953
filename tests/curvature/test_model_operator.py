"""Models that one way of differentiating cannot take are measured another way, and the answer stays right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case
from tests.curvature.awkward_models import (
    AWKWARD,
    STUBBORN,
    Kernel,
    Seeded,
    Unused,
    UnusedCustom,
    awkward,
)

EXACT = 1e-10
Zoo = Callable[[str], Case]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_auto_takes_reverse_over_reverse_where_the_model_forces_it(
    generator: Seeded, kind: type[nn.Module], k: int
) -> None:
    case = awkward(kind, generator)
    operator = case.hessian(engine="auto")
    v = case.rows(k)
    assert oracles.relative_error(operator.apply(v), v @ case.truth.hessian) < EXACT
    assert operator.engine == "reverse-over-reverse"


def test_auto_takes_forward_over_reverse_where_it_can(zoo_case: Zoo) -> None:
    operator = zoo_case("decoder").hessian(engine="auto")
    operator.apply(zoo_case("decoder").rows(1))
    assert operator.engine == "forward-over-reverse"


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_gauss_newton_is_right_without_forward_mode_too(
    generator: Seeded, kind: type[nn.Module], k: int
) -> None:
    case = awkward(kind, generator)
    v = case.rows(k)
    assert oracles.relative_error(case.gauss_newton().apply(v), v @ case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_column_restricted_products_are_right_without_forward_mode_too(
    generator: Seeded, kind: type[nn.Module]
) -> None:
    case = awkward(kind, generator)
    column, row = case.partition.blocks[0], case.partition.blocks[-1]
    v = torch.zeros(2, case.partition.size, dtype=torch.float64)
    v[:, case.partition.slices[column]] = case.rows(2)[:, case.partition.slices[column]]
    for operator, truth in (
        (case.gauss_newton(), case.truth.gauss_newton),
        (case.hessian(), case.truth.hessian),
    ):
        wanted = torch.zeros_like(v)
        wanted[:, case.partition.slices[row]] = (v @ truth)[:, case.partition.slices[row]]
        assert oracles.relative_error(operator.apply(v, columns=[column], rows=[row]), wanted) < EXACT


@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_block_tangents_are_right_without_forward_mode_too(generator: Seeded, kind: type[nn.Module]) -> None:
    case = awkward(kind, generator)
    batch, direction = case.problem.batches[0], case.rows(1)[0]
    theta = case.partition.vector(case.problem.model)
    blocks = [(block,) for block in case.partition.blocks]
    _, (tangents,) = case.gauss_newton().tangents(batch, direction[None], blocks)
    step = 1e-6
    for block, tangent in zip(case.partition.blocks, tangents, strict=True):
        moved = torch.zeros_like(direction)
        moved[case.partition.slices[block]] = step * direction[case.partition.slices[block]]
        up, down = (
            case.objective.outputs(batch, case.partition.unflatten(point)).detach()
            for point in (theta + moved, theta - moved)
        )
        assert oracles.relative_error(tangent, (up - down) / (2 * step)) < 1e-7


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", STUBBORN.values(), ids=STUBBORN)
def test_models_that_resist_batching_are_measured_all_the_same(
    generator: Seeded, kind: type[nn.Module], k: int
) -> None:
    case = awkward(kind, generator)
    v = case.rows(k)
    assert oracles.relative_error(case.hessian().apply(v), v @ case.truth.hessian) < EXACT
    assert oracles.relative_error(case.gauss_newton().apply(v), v @ case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("kind", [Unused, UnusedCustom])
def test_the_columns_and_rows_of_an_unused_layer_are_zero(generator: Seeded, kind: type[nn.Module]) -> None:
    case = awkward(kind, generator)
    v = torch.zeros_like(case.rows(2))
    v[:, case.partition.slices["pooler"]] = 1.0
    for operator in (case.gauss_newton(), case.hessian()):
        assert not operator.apply(v, columns=["pooler"]).any()
        assert not operator.apply(v, columns=["pooler"], rows=["pooler"]).any()
        assert not operator.apply(case.rows(2), rows=["pooler"]).any()


@pytest.mark.parametrize("operator", ["gauss_newton", "hessian"])
def test_a_model_that_cannot_be_differentiated_twice_raises_instead_of_answering(
    generator: Seeded, operator: str
) -> None:
    # torch.autograd.grad towards named inputs steps around the error that once_differentiable leaves behind.
    draws = generator(14)
    batch = (models.real(draws, 5, 4), models.labels(draws, 4, 5))
    model = models.redraw(Kernel(), draws)
    partition = Partition.of(model, "module")
    kind = {"gauss_newton": GaussNewton, "hessian": Hessian}[operator]
    with pytest.raises((UserError, RuntimeError), match="(?i)differentia|symmetr|derivative"):
        kind(Objective(model), [batch], partition, engine="exact").apply(
            torch.ones(1, partition.size, dtype=torch.float64)
        )


def test_out_of_memory_halves_the_rows_done_together_until_they_fit(zoo_case, monkeypatch):
    case = zoo_case("mlp_classifier")
    operator = GaussNewton(case.objective, case.problem.batches, case.partition)
    v = torch.randn(6, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, batched, sizes = operator.apply(v), operator._batched_passes, []

    def small_machine(batch, rows, *blocks):
        sizes.append(rows.shape[0])
        if rows.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return batched(batch, rows, *blocks)

    monkeypatch.setattr(operator, "_batched_passes", small_machine)
    torch.testing.assert_close(operator.apply(v), expected, rtol=1e-12, atol=1e-14)
    assert sizes == [6, 3]  # then one at a time, which is another engine


@pytest.mark.parametrize("name", sorted(models.ZOO))
@pytest.mark.parametrize("which", ["gauss_newton", "hessian"])
def test_batches_done_in_halves_give_the_same_products(
    zoo_case: Zoo, name: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = zoo_case(name)
    operator, truth = getattr(case, which)(), getattr(case.truth, which)
    monkeypatch.setattr(type(operator), "FILLS_CPU", 1)
    rows = case.rows(3)
    assert len(operator.pieces) > len(operator.micro_batches)
    for k in (1, 3):
        assert oracles.relative_error(operator.apply(rows[:k]), rows[:k] @ truth) < EXACT


class Crowd(nn.Module):
    """A sequence that looks at the rest of its batch: halves of a batch are another function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean(0))


def test_a_batch_whose_sequences_see_each_other_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = models.seeded(3)
    model, batch = models.redraw(Crowd(), draws), (models.real(draws, 6, 4), models.labels(draws, 4, 6))
    partition = Partition.of(model, "module")
    monkeypatch.setattr(GaussNewton, "FILLS_CPU", 1)
    operator = GaussNewton(Objective(model), [batch], partition)
    assert list(operator.pieces) == [batch]


def test_a_batch_read_by_a_function_of_the_users_is_cut_where_that_changes_nothing() -> None:
    draws = models.seeded(3)
    model, batch = (
        models.redraw(nn.Linear(4, 4), draws),
        (models.real(draws, 6, 4), models.labels(draws, 4, 6)),
    )
    for forward in (lambda model, batch: model(batch[0]), None):
        objective = Objective(model, forward=forward)
        assert [part[0].shape[0] for part in objective.split(batch, 4)] == [2, 2, 2]
    for forward in (
        lambda model, batch: model(batch[0].view(6, 4)),  # wants all of them
        lambda model, batch: model(batch[0] - batch[0].mean(0)),  # sees all of them
    ):
        objective = Objective(model, forward=forward)
        assert objective.split(batch, 2) == [batch]
    objective = Objective(model, targets=lambda batch: (batch[1] - batch[1].min()).flip(0))
    assert objective.split(batch, 2) == [batch]


@pytest.mark.parametrize("which", ["gauss_newton", "hessian"])
def test_out_of_memory_with_one_row_cuts_the_batches_finer(
    zoo_case: Zoo, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = zoo_case("decoder")
    operator, truth, sizes = getattr(case, which)(), getattr(case.truth, which), []
    method = "_dual_pass" if which == "gauss_newton" else "_forward_over_reverse"
    whole = getattr(operator, method)

    def small_machine(batch, *rest):
        sizes.append(batch[0].shape[0])
        if batch[0].shape[0] > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(batch, *rest)

    monkeypatch.setattr(operator, method, small_machine)
    v = case.rows(1)
    assert oracles.relative_error(operator.apply(v), v @ truth) < EXACT
    assert sizes[0] > 1 and set(sizes[1:]) >= {1}


def test_out_of_memory_with_a_single_sequence_is_raised(
    zoo_case: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = zoo_case("decoder").gauss_newton()

    def no_machine(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(operator, "_dual_pass", no_machine)
    with pytest.raises(torch.OutOfMemoryError):
        operator.apply(torch.zeros(1, operator.size, dtype=torch.float64))


def test_a_hessian_product_keeps_no_gradient_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter's gradient is let go of as soon as its tangent is kept: two vectors less at the peak."""
    draws = models.seeded(3)
    model, batch = (
        models.redraw(nn.Linear(4, 4), draws),
        (models.real(draws, 6, 4), models.labels(draws, 4, 6)),
    )
    operator = Hessian(Objective(model), [batch], Partition.of(model, "module"))
    vjp, kept = torch.func.vjp, []

    def watched(*arguments: Any) -> Any:
        z, pull_back, *rest = vjp(*arguments)

        def pulled(*cotangent: Tensor, **options: bool) -> Any:
            found = pull_back(*cotangent, **options)
            kept.extend(x.untyped_storage().nbytes() for x in found[0].values())
            return found

        return z, pulled, *rest

    monkeypatch.setattr(torch.func, "vjp", watched)
    operator.apply(torch.ones(1, operator.size, dtype=torch.float64))
    kept.clear()  # the first product of a model comes after the products that check its engine
    operator.apply(torch.ones(1, operator.size, dtype=torch.float64))
    assert kept == [8, 8]  # one number each
