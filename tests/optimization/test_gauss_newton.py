"""An outer Gauss-Newton step solves the dense model of the loss, whole or by groups of blocks, then searches a line."""

from __future__ import annotations

import copy
import io
import math
from functools import cache

import pytest
import torch
from torch import Tensor

import hessprobe as hp
from hessprobe.errors import UserError
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.inner_problem import GaussNewtonSettings
from hessprobe.optimization.local_model import LocalGradient
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.schedule import learning_rate_factor
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case
from tests.optimization.linearised import places
from tests.optimization.stepping import OUTER, RATE, fresh, named_groups, regression, text, theta_of, truth_on

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")
GROUPS = (("head", "embedding"), ("block.0",))
STRUCTURES = {"full": "full", "layerwise": "layerwise", "groups": GROUPS}
by_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


@cache
def truths_at_the_start() -> list[oracles.Dense]:
    """Returns the truths of the minibatches text(1, 3) before any step."""
    case, _ = fresh("decoder_ragged")
    return [truth_on(case, [batch]) for batch in text(1, count=3)]


def dense_solve(
    case: Case,
    truths: list[oracles.Dense],
    groups: list[tuple[str, ...]],
    clip: float | None = None,
    damping: float = 0.0,
    steps: int | None = None,
) -> Tensor:
    """Returns theta^ (p,): AdamW on every group's dense quadratic, linearised at the model's own parameters."""
    theta = theta_of(case)
    inner = theta.clone()
    steps = len(truths) if steps is None else steps
    for group in groups:
        where = places(case, group)
        x = theta[where].clone().requires_grad_()
        solver = torch.optim.AdamW([x], weight_decay=0.0)
        for i in range(steps):
            truth, delta = truths[i % len(truths)], x.detach() - theta[where]
            factor = learning_rate_factor(
                "global-cosine", outer=0, inner=i, outer_steps=OUTER, inner_steps=steps
            )
            solver.param_groups[0]["lr"] = RATE * factor
            curved = truth.gauss_newton[where][:, where] @ delta
            gradient = truth.gradient[where] + curved + damping * delta
            x.grad = gradient if clip is None else gradient * min(1.0, clip / float(gradient.norm()))
            solver.step()
        inner[where] = x.detach()
    return inner


# -- the inner solve, step by step -------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.1])
@by_structure
def test_the_inner_solve_is_adamw_on_the_dense_damped_quadratic(structure, clip):
    damping = 0.5 if clip is None else 0.0
    case, optimizer = fresh("decoder_ragged", structure=structure, solver="adamw", clip=clip, damping=damping)
    wanted = dense_solve(case, truths_at_the_start(), named_groups(case, structure), clip, damping)
    optimizer.step(text(1, count=3), text(2))
    assert oracles.relative_error(case.partition.flatten(optimizer.inner), wanted) < 1e-8


@pytest.mark.parametrize(("steps", "read"), [(2, 2), (5, 3)])
def test_inner_steps_take_the_minibatches_in_turn(steps, read):
    case, optimizer = fresh("decoder_ragged", solver="adamw", clip=None, inner_steps=steps)
    wanted = dense_solve(case, truths_at_the_start(), [case.partition.blocks], steps=steps)
    report = optimizer.step(text(1, count=3), text(2))
    assert oracles.relative_error(case.partition.flatten(optimizer.inner), wanted) < 1e-8
    assert (report.inner_iterations, len(report.inner_loss)) == (steps, steps)
    assert report.tokens == 8 * read  # each once, and only those read


@pytest.mark.parametrize("solver", ["muon", "adamw"])
@pytest.mark.parametrize("model", ["quadratic", "prox-linear"])
def test_layerwise_with_one_block_is_full_bit_for_bit(solver, model):
    def run(structure: str) -> tuple[Tensor, list[StepReport]]:
        case, optimizer = fresh(
            "decoder_ragged", lambda name: "all", structure=structure, solver=solver, model=model
        )
        reports = [optimizer.step(text(10 + i), text(20 + i)) for i in range(2)]
        return theta_of(case), reports

    (full, reports), (layerwise, others) = run("full"), run("layerwise")
    assert torch.equal(full, layerwise)
    assert reports == others
    assert {report.outcome for report in reports} == {"accepted"}


def test_a_structure_written_out_is_the_one_that_has_a_name():
    def run(structure) -> Tensor:
        case, optimizer = fresh("decoder_ragged", structure=structure, solver="adamw")
        optimizer.step(text(1), text(2))
        return theta_of(case)

    full, layerwise = run("full"), run("layerwise")
    assert torch.equal(full, run([["head", "block.0", "embedding"]]))
    assert torch.equal(layerwise, run((("embedding",), ("block.0",), ("head",))))
    assert not torch.equal(full, layerwise)


def test_the_report_says_what_was_done():
    case, optimizer = fresh("decoder_ragged", solver="adamw")
    batches, search = text(1), text(2, count=3)
    theta = theta_of(case)
    truth, first = truth_on(case, search), truth_on(case, batches[:1])
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
    assert report.inner_iterations == 2 and math.isnan(report.inner_residual)
    assert report.gradient_equivalents == pytest.approx(2 * 5 / 3 + 3 * (6 / 3 + 1))


def test_layerwise_searches_ten_step_sizes_and_counts_its_shared_passes():
    _, optimizer = fresh("decoder_ragged", structure="layerwise", solver="adamw", predict=False)
    report = optimizer.step(text(1), text(2, count=3))
    assert len(report.line_search_loss) == 10
    assert report.gradient_equivalents == pytest.approx(2 * (3 + 6) / 3 + 3 * 11 / 3)
    assert math.isnan(report.predicted_decrease)


def test_without_data_of_its_own_the_line_search_reads_the_steps():
    (case, optimizer), (there, other) = (fresh("decoder_ragged", solver="adamw") for _ in range(2))
    report, same = optimizer.step(text(1)), other.step(text(1), text(1))
    assert torch.equal(theta_of(case), theta_of(there))
    assert (report.line_search_loss, report.actual_decrease) == (same.line_search_loss, same.actual_decrease)
    assert (report.line_search_tokens, same.line_search_tokens) == (0, 16)


def test_a_warm_start_begins_at_the_last_inner_solution_and_a_cold_one_at_theta():
    for warm in (True, False):
        case, optimizer = fresh("decoder_ragged", solver="adamw", warm_start=warm, damping=0.2)
        optimizer.step(text(1), text(2))
        theta, batches = theta_of(case), text(3)
        truth = truth_on(case, batches[:1])
        delta = case.partition.flatten(optimizer.inner) - theta if warm else torch.zeros_like(theta)
        wanted = truth.loss + truth.gradient @ delta + 0.5 * delta @ truth.gauss_newton @ delta
        wanted += 0.1 * delta.square().sum()
        report = optimizer.step(batches, text(4))
        assert report.inner_loss[0] == pytest.approx(float(wanted), rel=1e-10)


# -- what goes wrong ---------------------------------------------------------------------------------------


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


def poison_calls(optimizer: GaussNewton, monkeypatch, calls: set[int]) -> None:
    """Makes the numbered calls for inner gradients answer with an infinite one."""
    gradients, seen = optimizer.local.gradients, []

    def poisoned(*given) -> list[LocalGradient]:
        found = gradients(*given)
        seen.append(0)
        if len(seen) - 1 in calls:
            found = [
                LocalGradient(value=f.value, gradient={n: g / 0.0 for n, g in f.gradient.items()})
                for f in found
            ]
        return found

    monkeypatch.setattr(optimizer.local, "gradients", poisoned)


@pytest.mark.parametrize("structure", ["full", "layerwise"])
@pytest.mark.parametrize("retries", [1, 2])
def test_an_inner_loop_that_leaves_the_numbers_is_done_again_at_a_lower_rate(monkeypatch, structure, retries):
    settings = {"structure": structure, "solver": "adamw", "outer_steps": 100}
    case, optimizer = fresh("mlp_regression", "module", **settings)
    optimizer.step(regression(1), regression(2))  # so that there is a warm start to throw away
    there, other = fresh("mlp_regression", "module", **settings, learning_rate=RATE / 4**retries)
    there.partition.assign(there.problem.model, theta_of(case))
    other._start_inner(theta_of(case))
    other.outer = 1
    # An attempt ends at its first bad step: each failed one makes a single call, but the first fails at its second.
    poison_calls(optimizer, monkeypatch, {1} if retries == 1 else {1, 2})
    report, wanted = (o.step(regression(3), regression(4)) for o in (optimizer, other))
    at = f"{RATE / 4**retries:g}"
    assert (
        report.outcome == f"accepted after {'1 retry' if retries == 1 else '2 retries'} at learning rate {at}"
    )
    assert wanted.outcome == "accepted"
    assert torch.equal(theta_of(case), theta_of(there))
    assert report.inner_loss == wanted.inner_loss
    assert report.gradient_equivalents == pytest.approx(
        wanted.gradient_equivalents + (1 + retries) * other.local.cost
    )
    # What was changed for the retry holds for that step alone.
    assert optimizer.step(regression(5), regression(6)).outcome == "accepted"
    assert optimizer.settings.learning_rate == RATE


def test_an_inner_solve_that_is_not_finite_is_rejected_and_leaves_nothing_behind():
    case, optimizer = fresh("mlp_regression", "module", solver="adamw")
    theta = theta_of(case)
    with torch.no_grad():
        loss = float(case.objective.loss(regression(2)))
    report = optimizer.step(regression(1, poison=True), regression(2))
    assert report.outcome == (
        f"rejected: the inner solve is not finite after 2 retries at learning rate {RATE / 16:g}; a lower learning "
        "rate or more damping helps"
    )
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


def test_a_minibatch_without_a_target_takes_no_part():
    (case, optimizer), (there, other) = (fresh("decoder_ragged", solver="adamw") for _ in range(2))
    inputs, targets = text(5)[0]
    empty = (inputs, torch.full_like(targets, models.IGNORED))
    report = optimizer.step([text(1)[0], empty, text(1)[1]], text(2))
    assert report == other.step(text(1), text(2))
    assert torch.equal(theta_of(case), theta_of(there))
    with pytest.raises(UserError, match="no token carries a target"):
        optimizer.step([empty], text(2))


# -- saved and restored ------------------------------------------------------------------------------------


@by_structure
@pytest.mark.parametrize("solver", ["muon", "adamw", "soap", "cg"])
def test_a_saved_optimizer_goes_on_bit_for_bit(solver, structure):
    settings = {"solver": solver, "structure": structure, "damping": 1.0, "cg_iterations": 3}
    case, optimizer = fresh("decoder_ragged", **settings)
    for i in range(2):
        optimizer.step(text(10 + i, count=1))
    file = io.BytesIO()
    torch.save((theta_of(case), optimizer.state_dict()), file)
    there, other = fresh("decoder_ragged", **settings)
    file.seek(0)
    theta, state = torch.load(file, weights_only=True)
    there.partition.assign(there.problem.model, theta)
    other.load_state_dict(state)
    for i in range(2, 4):
        report = optimizer.step(text(10 + i, count=1))
        again = other.step(text(10 + i, count=1))
        assert again == report or repr(again) == repr(report)  # NaN of two runs are not equal
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


def test_a_state_of_another_structure_is_refused():
    _, full = fresh("decoder_ragged")
    _, layerwise = fresh("decoder_ragged", structure="layerwise")
    with pytest.raises(UserError, match="another model, structure or solver.*1 inner solvers, wanted .* 3"):
        layerwise.load_state_dict(full.state_dict())
    _, other = fresh("mlp_regression")
    with pytest.raises(UserError, match="another model"):
        other.load_state_dict(full.state_dict())


# -- the public face, and mistakes -------------------------------------------------------------------------


def test_it_is_used_alone_as_torch_optimizers_are():
    model = models.ZOO["decoder_ragged"](models.seeded(7)).model
    optimizer = hp.optim.GaussNewton(model, structure="layerwise", model="prox-linear", solver="adamw")
    assert optimizer.partition == Partition.of(model) and optimizer.settings.model == "prox-linear"
    before = optimizer.partition.vector(model)
    (batch,) = text(1, count=1)
    report = optimizer.step(batch, batch)  # one minibatch need not be a list
    assert isinstance(report, hp.optim.StepReport) and report.outcome == "accepted"
    assert not torch.equal(optimizer.partition.vector(model), before)
    assert hp.optim.GaussNewton is GaussNewton and hp.optim.GaussNewtonSettings is GaussNewtonSettings
    assert set(hp.optim.__all__) <= set(dir(hp.optim))
    assert all(getattr(hp.optim, name) for name in hp.optim.__all__)
    assert not hasattr(hp.optim, "GaussNewtons")


def test_options_stand_in_place_of_those_of_the_settings():
    model = models.ZOO["mlp_regression"](models.seeded(7)).model
    settings = GaussNewtonSettings(learning_rate=0.5, damping=0.1)
    objective = Objective(model, loss="squared_error")
    optimizer = GaussNewton(model, objective, partition="module", settings=settings, damping=0.3)
    assert (optimizer.settings.learning_rate, optimizer.settings.damping) == (0.5, 0.3)
    assert optimizer.partition.kind == "module"


def test_parts_of_different_models_are_refused():
    (one, _), (other, _) = fresh("mlp_regression", "module"), fresh("decoder_ragged")
    with pytest.raises(UserError, match="objective is of another model"):
        GaussNewton(one.problem.model, other.objective)
    with pytest.raises(UserError, match="partition is of another model: this one has no"):
        GaussNewton(one.problem.model, one.objective, partition=other.partition)


def test_a_step_needs_minibatches():
    _, optimizer = fresh("mlp_regression", "module")
    for empty in (([], regression(1)), (regression(1), [])):
        with pytest.raises(UserError, match="at least one minibatch"):
            optimizer.step(*empty)
