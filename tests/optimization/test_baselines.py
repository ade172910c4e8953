"""The AdamW baseline is torch's AdamW on the token-weighted mean gradient of the whole outer batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.models import Problem

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")
RATE = 0.01


def fresh(name: str = "decoder_ragged", **options) -> tuple[Problem, Partition, FirstOrderOptimizer]:
    problem = models.ZOO[name](models.seeded(7))
    partition = Partition.of(problem.model, "parameter")
    objective = Objective(problem.model, loss=problem.loss)
    options = {"learning_rate": RATE, "clip": None, **options}
    return problem, partition, FirstOrderOptimizer(objective, partition, **options)


def torch_adamw(problem: Problem, groups: list[list], clip: float | None, decay: float = 0.0) -> list[Tensor]:
    """Moves a copy of the model by torch's AdamW, a step a group, on gradients of the dense truth's loss."""
    model = copy.deepcopy(problem.model)
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=decay)
    for group in groups:
        truth = oracles.dense(model, group, problem.loss)
        pieces = truth.gradient.split([truth.shapes[name].numel() for name in truth.names])
        for (_, p), piece in zip(model.named_parameters(), pieces, strict=True):
            p.grad = piece.view_as(p).clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adamw.step()
    return [p.detach() for p in model.parameters()]


def assert_same(problem: Problem, wanted: list[Tensor]) -> None:
    for p, other in zip(problem.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), other, rtol=1e-8, atol=1e-8 * RATE)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_step_on_the_gradient_accumulated_over_ragged_minibatches(decay):
    problem, _, optimizer = fresh(weight_decay=decay)
    wanted = torch_adamw(problem, [problem.batches] * 2, None, decay)
    report, _ = [optimizer.step(list(problem.batches)) for _ in range(2)]
    assert_same(problem, wanted)
    assert report.outcome == "accepted"
    assert report.tokens == sum(int((y != models.IGNORED).sum()) for _, y in problem.batches)
    assert report.gradient_equivalents == len(problem.batches)
    assert math.isnan(report.step_size)


def test_one_step_a_minibatch_where_nothing_is_accumulated():
    problem, _, optimizer = fresh(accumulate=False)
    wanted = torch_adamw(problem, [[batch] for batch in problem.batches], None)
    report = optimizer.step(list(problem.batches))
    assert_same(problem, wanted)
    assert len(report.inner_loss) == len(problem.batches)


def test_the_gradient_is_clipped_at_its_norm_over_all_parameters():
    problem, _, optimizer = fresh(clip=0.05)
    truth = oracles.dense(*problem)
    wanted = torch_adamw(problem, [problem.batches], 0.05)
    report = optimizer.step(list(problem.batches))
    assert report.gradient_norm == pytest.approx(float(truth.gradient.norm()), rel=1e-9)
    assert report.gradient_norm > 0.05
    for p, other in zip(problem.model.parameters(), wanted, strict=True):
        # torch divides by norm + 1e-6, we by norm + 1e-12; Adam's eps lets a trace of it through.
        torch.testing.assert_close(p.detach(), other, rtol=0, atol=1e-3 * RATE)


def test_the_learning_rate_follows_the_cosine_over_outer_steps():
    problem, partition, optimizer = fresh(schedule="global-cosine", outer_steps=2)
    norms = [optimizer.step(list(problem.batches)).update_norm for _ in range(2)]
    constant_problem, _, constant = fresh()
    plain = [constant.step(list(constant_problem.batches)).update_norm for _ in range(2)]
    assert norms[0] == plain[0]
    assert norms[1] == pytest.approx(0.5 * plain[1])


def test_the_update_is_what_was_added_to_the_parameters():
    problem, partition, optimizer = fresh(solver="muon")
    before = partition.vector(problem.model)
    report = optimizer.step(list(problem.batches))
    assert report.update_norm == pytest.approx(float((partition.vector(problem.model) - before).norm()))
    assert report.loss == pytest.approx(float(oracles.dense(
        *models.ZOO["decoder_ragged"](models.seeded(7))).loss))  # fmt: skip


def test_a_frozen_parameter_does_not_move():
    problem, partition, optimizer = fresh("frozen_layer", weight_decay=0.5)
    frozen = {n: p.detach().clone() for n, p in problem.model.named_parameters() if n not in partition.names}
    optimizer.step(list(problem.batches))
    assert frozen and all(torch.equal(problem.model.get_parameter(n), p) for n, p in frozen.items())


def test_a_loss_that_is_not_finite_takes_no_step_and_says_so():
    problem, partition, optimizer = fresh("mlp_regression")
    before = partition.vector(problem.model)
    poisoned = (problem.batches[0][0] * math.inf, problem.batches[0][1])
    report = optimizer.step([poisoned])
    assert report.outcome == "diverged: the loss is not finite"
    assert torch.equal(partition.vector(problem.model), before)


@pytest.mark.parametrize("solver", ["adamw", "muon"])
def test_a_saved_optimizer_goes_on_bit_for_bit(solver):
    problem, partition, optimizer = fresh(solver=solver, schedule="global-cosine", outer_steps=4)
    optimizer.step(list(problem.batches))
    state, theta = copy.deepcopy(optimizer.state_dict()), partition.vector(problem.model)
    there, _, other = fresh(solver=solver, schedule="global-cosine", outer_steps=4)
    partition.assign(there.model, theta)
    other.load_state_dict(state)
    assert optimizer.step(list(problem.batches)) == other.step(list(problem.batches))
    assert torch.equal(partition.vector(problem.model), partition.vector(there.model))


def test_no_minibatch_is_a_mistake():
    _, _, optimizer = fresh()
    with pytest.raises(UserError, match="at least one minibatch"):
        optimizer.step([])
