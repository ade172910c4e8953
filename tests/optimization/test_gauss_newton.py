"""An outer Gauss-Newton step solves the dense quadratic by AdamW or Muon, whole or by layer, then searches a line."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.optimization.gauss_newton import GaussNewtonOptimizer, GaussNewtonSettings
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.schedule import learning_rate_factor
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")
RATE, OUTER = 0.03, 4


def fresh(
    name: str, by: str | Callable[[str], str] = "layer", **settings
) -> tuple[Case, GaussNewtonOptimizer]:
    """Returns a zoo problem of its own (steps move the model) and an optimizer on it."""
    problem = models.ZOO[name](models.seeded(7))
    partition = Partition.of(problem.model, by)
    objective = Objective(problem.model, loss=problem.loss)
    chosen = GaussNewtonSettings(**{"learning_rate": RATE, "outer_steps": OUTER, **settings})
    # The dense truth is made where a test needs it, at the theta it needs.
    case = Case(problem, objective, partition, None)  # type: ignore[arg-type]
    return case, GaussNewtonOptimizer(objective, partition, chosen)


def text(seed: int, count: int = 2, vocabulary: int = 7) -> list:
    """Returns minibatches with something to learn that carries over: every token is its own target."""
    g = models.seeded(seed)
    return [(tokens, tokens) for tokens in torch.randint(vocabulary, (count, 2, 4), generator=g)]


def theta_of(case: Case) -> Tensor:
    return case.partition.vector(case.problem.model)


def dense_solve(case: Case, batches: list, groups: list[list[slice]], clip: float | None) -> Tensor:
    """Returns theta^ (p,): AdamW on every group's dense quadratic, linearised at the model's own parameters."""
    theta = theta_of(case)
    inner = theta.clone()
    found = [
        oracles.dense(case.problem.model, [batch], case.problem.loss).in_order(case.partition.names)
        for batch in batches
    ]
    for group in groups:
        where = torch.cat([torch.arange(s.start, s.stop) for s in group])
        x = theta[where].clone().requires_grad_()
        solver = torch.optim.AdamW([x], weight_decay=0.0)
        for i, truth in enumerate(found):
            factor = learning_rate_factor(
                "global-cosine", outer=0, inner=i, outer_steps=OUTER, inner_steps=len(found)
            )
            solver.param_groups[0]["lr"] = RATE * factor
            gradient = truth.gradient[where] + truth.gauss_newton[where][:, where] @ (
                x.detach() - theta[where]
            )
            x.grad = gradient if clip is None else gradient * min(1.0, clip / float(gradient.norm()))
            solver.step()
        inner[where] = x.detach()
    return inner


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("structure", ["full", "layerwise"])
def test_the_inner_solve_is_adamw_on_the_dense_quadratic(structure, clip):
    case, optimizer = fresh("decoder_ragged", structure=structure, solver="adamw", clip=clip)
    batches, slices = text(1, count=3), list(case.partition.slices.values())
    groups = [slices] if structure == "full" else [[s] for s in slices]
    wanted = dense_solve(case, batches, groups, clip)
    optimizer.step(batches, text(2))
    assert oracles.relative_error(case.partition.flatten(optimizer.inner), wanted) < 1e-8


@pytest.mark.parametrize("solver", ["muon", "adamw"])
@pytest.mark.parametrize("model", ["quadratic", "prox-linear"])
def test_layerwise_with_one_block_is_full_bit_for_bit(solver, model):
    def run(structure: str) -> tuple[Tensor, list[StepReport]]:
        case, optimizer = fresh(
            "decoder_ragged", lambda name: "all", structure=structure, solver=solver, model=model
        )
        reports = [optimizer.step(text(10 + i), text(20 + i)) for i in range(3)]
        return theta_of(case), reports

    (full, reports), (layerwise, others) = run("full"), run("layerwise")
    assert torch.equal(full, layerwise)
    assert reports == others
    assert {report.outcome for report in reports} == {"accepted"}


def test_layerwise_with_several_blocks_is_not_full():
    def run(structure: str) -> Tensor:
        case, optimizer = fresh("decoder_ragged", structure=structure, solver="adamw")
        optimizer.step(text(1), text(2))
        return theta_of(case)

    assert not torch.equal(run("full"), run("layerwise"))


def test_the_report_says_what_was_done():
    case, optimizer = fresh("decoder_ragged", solver="adamw")
    batches, search = text(1), text(2, count=3)
    theta = theta_of(case)
    truth = oracles.dense(case.problem.model, search, "cross_entropy").in_order(case.partition.names)
    first = oracles.dense(case.problem.model, batches[:1], "cross_entropy")
    report = optimizer.step(batches, search)
    after = theta_of(case)
    move = after - theta
    with torch.no_grad():
        end = float(case.objective.loss(search))
    assert report.outcome == "accepted"
    torch.testing.assert_close(
        after, theta + report.step_size * (case.partition.flatten(optimizer.inner) - theta)
    )
    assert report.step_size == min(report.line_search_loss, key=report.line_search_loss.__getitem__)
    assert report.loss == pytest.approx(float(truth.loss), rel=1e-12)
    assert report.actual_decrease == pytest.approx(float(truth.loss) - end, rel=1e-9)
    model = -(truth.gradient @ move + 0.5 * move @ truth.gauss_newton @ move)
    assert report.predicted_decrease == pytest.approx(float(model), rel=1e-9)
    assert report.update_norm == pytest.approx(float(move.norm()), rel=1e-12)
    assert report.gradient_norm == pytest.approx(float(first.gradient.norm()), rel=1e-9)
    assert report.inner_loss[0] == pytest.approx(float(first.loss), rel=1e-12)
    assert (report.tokens, report.line_search_tokens, len(report.inner_loss)) == (16, 24, 2)
    assert report.gradient_equivalents == pytest.approx(2 * 5 / 3 + 3 * (6 / 3 + 1))


def test_a_warm_start_begins_at_the_last_inner_solution_and_a_cold_one_at_theta():
    for warm in (True, False):
        case, optimizer = fresh("decoder_ragged", solver="adamw", warm_start=warm)
        optimizer.step(text(1), text(2))
        theta, batches = theta_of(case), text(3)
        truth = oracles.dense(case.problem.model, batches[:1], "cross_entropy").in_order(case.partition.names)
        delta = case.partition.flatten(optimizer.inner) - theta if warm else torch.zeros_like(theta)
        wanted = truth.loss + truth.gradient @ delta + 0.5 * delta @ truth.gauss_newton @ delta
        report = optimizer.step(batches, text(4))
        assert report.inner_loss[0] == pytest.approx(float(wanted), rel=1e-10)


@pytest.mark.parametrize("solver", ["muon", "adamw"])
def test_where_every_step_size_harms_the_parameters_stay(solver):
    case, optimizer = fresh("decoder_ragged", solver=solver, learning_rate=1e4)
    theta = theta_of(case)
    report = optimizer.step(text(1), text(2))
    assert report.outcome == "rejected: no step size lowers the loss"
    assert (report.step_size, report.update_norm, report.predicted_decrease, report.actual_decrease) == (
        0,
    ) * 4
    assert math.isfinite(report.loss)
    assert torch.equal(theta_of(case), theta)
    # The next solve starts afresh from theta, not from where nothing was to be found.
    assert torch.equal(case.partition.flatten(optimizer.inner), theta)
    assert not any(solver.state for inner in optimizer.solvers for solver in inner.optimizers)


def regression(seed: int, poison: bool = False) -> list:
    g = models.seeded(seed)
    batches = [(models.real(g, 4, 3), models.real(g, 4, 2)) for _ in range(2)]
    if poison:
        batches[0][0][1, 1] = math.nan
    return batches


def test_an_inner_solve_that_is_not_finite_is_rejected_and_leaves_nothing_behind():
    case, optimizer = fresh("mlp_regression", "module", solver="adamw")
    theta = theta_of(case)
    with torch.no_grad():
        loss = float(case.objective.loss(regression(2)))
    report = optimizer.step(regression(1, poison=True), regression(2))
    assert report.outcome.startswith("rejected: the inner solve is not finite")
    assert (report.step_size, report.update_norm, report.line_search_loss) == (0.0, 0.0, {})
    assert report.loss == pytest.approx(loss)  # there is nothing wrong with the loss itself
    assert torch.equal(theta_of(case), theta)
    after = optimizer.step(regression(3), regression(4))
    assert after.outcome == "accepted"

    clean, other = fresh("mlp_regression", "module", solver="adamw")
    other.outer = 1  # the clock runs on over a rejected step
    assert other.step(regression(3), regression(4)) == after
    assert torch.equal(theta_of(clean), theta_of(case))


def test_a_loss_that_is_not_finite_where_it_starts_is_no_rejected_step():
    case, optimizer = fresh("mlp_regression", "module", solver="adamw")
    theta = theta_of(case)
    report = optimizer.step(regression(1), regression(2, poison=True))
    assert report.outcome == "diverged: the loss is not finite"
    assert torch.equal(theta_of(case), theta)


@pytest.mark.parametrize("structure", ["full", "layerwise"])
@pytest.mark.parametrize("solver", ["muon", "adamw"])
def test_a_saved_optimizer_goes_on_bit_for_bit(solver, structure):
    settings = {"solver": solver, "structure": structure}
    case, optimizer = fresh("decoder_ragged", **settings)
    for i in range(2):
        optimizer.step(text(10 + i), text(20 + i))
    file = io.BytesIO()
    torch.save((theta_of(case), optimizer.state_dict()), file)
    there, other = fresh("decoder_ragged", **settings)
    file.seek(0)
    theta, state = torch.load(file, weights_only=True)
    there.partition.assign(there.problem.model, theta)
    other.load_state_dict(state)
    for i in range(2, 4):
        report = optimizer.step(text(10 + i), text(20 + i))
        assert other.step(text(10 + i), text(20 + i)) == report
        assert report.outcome == "accepted"
    assert torch.equal(theta_of(case), theta_of(there))


def test_saving_does_not_change_the_run():
    case, optimizer = fresh("decoder_ragged")
    there, other = fresh("decoder_ragged")
    for i in range(2):
        copy.deepcopy(optimizer.state_dict())
        optimizer.step(text(10 + i), text(20 + i))
        other.step(text(10 + i), text(20 + i))
    assert torch.equal(theta_of(case), theta_of(there))


def test_what_does_not_exist_is_refused():
    with pytest.raises(UserError, match="no structure named 'diagonal'.*full, layerwise"):
        fresh("mlp_regression", "module", structure="diagonal")
    with pytest.raises(UserError, match="no inner solver named 'sgd'"):
        fresh("mlp_regression", "module", solver="sgd")
    _, optimizer = fresh("mlp_regression", "module")
    for empty in (([], regression(1)), (regression(1), [])):
        with pytest.raises(UserError, match="at least one minibatch"):
            optimizer.step(*empty)
