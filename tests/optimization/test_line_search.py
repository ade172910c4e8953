"""The line search takes the step size with the least true loss, and none where every one of them harms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.optimization.line_search import LineSearch, search, step_sizes
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import real, redraw


class Logarithm(nn.Module):
    """z = log w: a loss that exists for w > 0 alone."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.log()


def along(w: float, direction: float, grid: tuple[float, ...]) -> LineSearch:
    """Searches for log w = 0 from w along a direction: losses 1/2 log(w + alpha direction)^2."""
    model = Logarithm(w)
    partition = Partition.of(model, "parameter")
    one = torch.ones(1, 1, dtype=torch.float64)
    vector = torch.tensor([direction], dtype=torch.float64)
    return search(
        Objective(model, loss="squared_error"), partition, partition.vector(model), vector,
        [(one, torch.zeros_like(one))], grid,
    )  # fmt: skip


def test_the_grid_is_the_studys():
    assert step_sizes(5) == pytest.approx([1, 0.5**0.5, 0.5, 0.5**1.5, 0.25])
    assert len(step_sizes(10)) == 10
    with pytest.raises(UserError, match="at least 1 entry, got 0"):
        step_sizes(0)


def test_the_least_loss_wins():
    found = along(3.0, -4.0, step_sizes(5))  # w = 1 is at alpha = 1/2
    assert found.step_size == pytest.approx(0.5)
    assert found.start == pytest.approx(0.5 * math.log(3.0) ** 2)
    assert found.decrease == pytest.approx(found.start)
    finite = {a: loss for a, loss in found.losses.items() if math.isfinite(loss)}
    assert finite == pytest.approx({a: 0.5 * math.log(3 - 4 * a) ** 2 for a in finite})
    assert set(found.losses) == set(step_sizes(5))


def test_a_step_size_without_a_finite_loss_is_passed_over():
    found = along(3.0, -4.0, (1.0, 0.25))  # w = -1 has no logarithm
    assert math.isnan(found.losses[1.0])
    assert found.step_size == 0.25


@pytest.mark.parametrize("direction", [+1.0, -100.0], ids=["uphill", "nowhere finite"])
def test_where_every_step_size_harms_none_is_taken(direction):
    found = along(3.0, direction, step_sizes(5))
    assert found.step_size == 0.0
    assert found.decrease == 0.0


def test_an_equal_loss_is_no_improvement():
    assert along(3.0, 0.0, step_sizes(3)).step_size == 0.0


def test_losses_are_means_over_the_tokens_of_all_minibatches(generator):
    g = generator(1)
    model = redraw(nn.Linear(3, 2), g)
    batches = [(real(g, n, 3), real(g, n, 2)) for n in (5, 2)]
    partition, objective = Partition.of(model, "module"), Objective(model, loss="squared_error")
    theta, direction = partition.vector(model), real(g, partition.size)
    found = search(objective, partition, theta, direction, list(batches), (0.5,))
    whole = tuple(torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        for alpha, loss in ((0.0, found.start), (0.5, found.losses[0.5])):
            at = partition.unflatten(theta + alpha * direction)
            z = torch.func.functional_call(model, at, (whole[0],))
            assert loss == pytest.approx(float(0.5 * (z - whole[1]).square().sum(1).mean()), rel=1e-12)
    assert found.tokens == 7
    assert torch.equal(partition.vector(model), theta)
    assert model.training
