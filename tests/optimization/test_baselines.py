"""A baseline takes its library's step on the token-weighted mean gradient of the whole outer batch, and goes on
after an interruption as if there had been none, whatever it draws."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.kronecker import kronecker_factors
from hessprobe.errors import RunFailed, UserError
from hessprobe.optimization.baselines import BASELINES, FirstOrderOptimizer
from hessprobe.optimization.inner_solver import hidden_matrices
from hessprobe.optimization.kfac import KFAC
from hessprobe.problem import splitting
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


def torch_adamw(
    problem: Problem,
    groups: list[list],
    clip: float | None,
    decay: float = 0.0,
    factors: list[float] | None = None,
) -> list[Tensor]:
    """Moves a copy of the model by torch's AdamW, a step a group, on gradients of the dense truth's loss."""
    model = copy.deepcopy(problem.model)
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=decay)
    for i, group in enumerate(groups):
        adamw.param_groups[0]["lr"] = RATE * (factors[i] if factors else 1.0)
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
    problem, _partition, optimizer = fresh(schedule="global-cosine", outer_steps=2)
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


def test_the_learning_rate_rises_in_a_line_before_the_schedule_starts():
    problem, _, optimizer = fresh(
        "mlp_regression", schedule="global-cosine", outer_steps=5, learning_rate_warmup=3
    )
    factors = [1 / 4, 2 / 4, 3 / 4, 1.0, 0.5]
    wanted = torch_adamw(problem, [problem.batches] * 5, None, factors=factors)
    for _ in factors:
        optimizer.step(list(problem.batches))
    assert_same(problem, wanted)


def test_a_warm_up_counts_every_step_and_may_be_longer_than_the_run():
    problem, _, optimizer = fresh(
        "mlp_regression", accumulate=False, schedule="global-cosine", learning_rate_warmup=2
    )
    groups = [[batch] for batch in problem.batches]
    factors = [(i + 1) / (2 * len(groups) + 1) for i in range(len(groups))]
    wanted = torch_adamw(problem, groups, None, factors=factors)
    optimizer.step(list(problem.batches))
    assert_same(problem, wanted)


def saved(state: Any) -> Any:
    """Returns a state as a checkpoint gives it back: tensors and plain values alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("solver", BASELINES)
def test_a_saved_optimizer_goes_on_bit_for_bit(solver, before):
    options = {
        "solver": solver,
        "schedule": "global-cosine",
        "outer_steps": 8,
        "learning_rate_warmup": 2,
        "seed": 3,
    }
    if solver not in ("adamw", "muon"):
        options["refresh"] = 2  # so that what was computed at an earlier theta has to be kept
    problem, partition, optimizer = fresh(**options)
    for _ in range(before):
        optimizer.step(list(problem.batches))
    state, theta = saved(optimizer.state_dict()), partition.vector(problem.model)
    there, _, other = fresh(**options)
    partition.assign(there.model, theta)
    other.load_state_dict(state)
    for _ in range(2):
        assert optimizer.step(list(problem.batches)) == other.step(list(problem.batches))
    assert torch.equal(partition.vector(problem.model), partition.vector(there.model))
    assert not torch.equal(partition.vector(problem.model), theta)


def test_minibatches_accumulated_are_one_big_batch():
    # Shampoo stands for all that see the gradient alone, and AdamW is tested above: Muon rounds to bfloat16, and SOAP
    # scales directions without a gradient up to the size of the rest, so rounding decides where they lead.
    thetas = []
    for parts in (1, 3):
        problem, partition, optimizer = fresh(solver="shampoo")
        g = models.seeded(2)
        x, y = torch.randint(7, (6, 5), generator=g), models.labels(g, 7, 6, 5, ignore=0.3)
        for _ in range(3):
            optimizer.step([(a, b) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)])
        thetas.append(partition.vector(problem.model))
    torch.testing.assert_close(thetas[0], thetas[1], rtol=1e-6, atol=1e-6 * RATE)


@pytest.mark.parametrize("solver", BASELINES)
def test_the_loss_falls_within_a_few_steps(solver):
    rate = {"kfac": 1.0, "ekfac": 1.0, "muon": 0.05}.get(solver, 0.02)
    problem, _, optimizer = fresh("decoder", solver=solver, learning_rate=rate, learning_rate_warmup=1)
    losses = [optimizer.step(list(problem.batches)).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.15


@pytest.mark.parametrize("solver", ["sophia", "kfac", "ekfac"])
def test_what_is_drawn_is_a_function_of_seed_and_step(solver):
    found, state = {}, torch.get_rng_state()
    for key, seed in (("one", 1), ("same", 1), ("other", 2)):
        problem, partition, optimizer = fresh(solver=solver, seed=seed, learning_rate=0.1)
        torch.manual_seed(len(found))  # nothing may come from here
        for _ in range(2):
            optimizer.step(list(problem.batches))
        found[key] = partition.vector(problem.model)
    torch.set_rng_state(state)
    assert torch.equal(found["one"], found["same"]) and not torch.equal(found["one"], found["other"])


def test_curvature_is_counted_when_it_is_estimated():
    problem, _, optimizer = fresh(solver="sophia")
    costs = [optimizer.step(list(problem.batches)).gradient_equivalents for _ in range(11)]
    assert costs == [6.0, *[3.0] * 9, 6.0]
    problem, partition, optimizer = fresh(solver="kfac", refresh=2, curvature_minibatches=1)
    costs = [optimizer.step(list(problem.batches)).gradient_equivalents for _ in range(3)]
    extra = kronecker_factors(
        Objective(problem.model), problem.batches[:1], partition, generator=models.seeded(0)
    ).gradient_equivalents
    assert costs == [3 + extra, 3.0, 3 + extra] and 1 < extra < 3


@pytest.mark.parametrize("solver", ["kfac", "ekfac"])
def test_factors_of_a_long_minibatch_come_from_its_pieces(monkeypatch, solver):
    """At the cost of the whole, and with the factors of micro-batches of that size."""
    g = models.seeded(5)
    tokens = torch.randint(5, (4, 3), generator=g)
    found = []
    for most, batches in ((6, [(tokens, tokens)]), (8192, [(part, part) for part in tokens.split(2)])):
        monkeypatch.setattr(splitting, "POSITIONS_AT_ONCE", most)
        problem, partition, optimizer = fresh(solver=solver, learning_rate=0.1)
        found.append(optimizer.step(batches).gradient_equivalents / len(batches))
        found.append(partition.vector(problem.model))
    assert found[0] == pytest.approx(found[2], rel=1e-12)
    torch.testing.assert_close(found[1], found[3], rtol=1e-9, atol=1e-12)


# -- K-FAC's own step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [None, 1e-3, 1e6])
def test_kfac_takes_the_damped_kronecker_step_and_adamw_the_rest(trust):
    problem, partition, _ = fresh()
    solver = KFAC(
        Objective(problem.model), partition, damping=0.05, momentum=0.8, trust=trust, weight_decay=0.1
    )
    factors_at = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    theta, rest, mean = dict(factors_at), {}, {}
    solver.refresh(list(problem.batches), models.seeded(5))
    factors = kronecker_factors(
        Objective(problem.model),
        list(problem.batches),
        partition,
        generator=models.seeded(5),
        parameters=factors_at,
    )
    assert (
        set(factors.names) <= {*hidden_matrices(problem.model), "head.weight"}
        and "head.weight" in factors.names
    )
    rest = {n: p.clone().requires_grad_() for n, p in theta.items() if n not in factors.names}
    adamw = torch.optim.AdamW(list(rest.values()), lr=0.5 * 0.003, weight_decay=0.1)
    g = models.seeded(6)
    for t in (1, 2):
        gradients = {n: models.real(g, *p.shape) for n, p in theta.items()}
        norm = float(torch.cat([x.reshape(-1) for x in gradients.values()]).norm())
        assert solver.step(gradients, 0.5, 2.0) == pytest.approx(norm)
        clipped = {n: x * 2.0 / norm for n, x in gradients.items()}
        mean = {n: 0.8 * mean.get(n, 0 * clipped[n]) + 0.2 * clipped[n] for n in factors.names}
        smoothed = {n: m / (1 - 0.8**t) for n, m in mean.items()}
        d = factors.apply_inverse(smoothed, damping=0.05)
        moved = 0.5 * sum(float((d[n] * smoothed[n]).sum()) for n in d)
        bound = min(1.0, math.sqrt((trust or math.inf) / moved))
        assert (bound < 1) == (trust == 1e-3)
        for n in d:
            theta[n] = (1 - 0.5 * 0.003 * 0.1) * theta[n] - 0.5 * bound * d[n]
        for n, p in rest.items():
            p.grad = clipped[n]
        adamw.step()
    for n, p in problem.model.named_parameters():
        torch.testing.assert_close(p.detach(), (theta if n in d else rest)[n].detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_a_bounded_step_moves_the_model_by_what_was_allowed_per_layer(damping):
    model = models.ZOO["decoder"](models.seeded(7)).model
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("q.weight", "v.weight", "out.weight", "up.weight", "down.weight")))
    partition, g = Partition.of(model, "parameter"), models.seeded(1)
    batch = (torch.randint(7, (64, 8), generator=g), torch.randint(7, (64, 8), generator=g))
    objective = Objective(model)
    optimizer = FirstOrderOptimizer(
        objective, partition, solver="kfac", learning_rate=1.0, clip=None, damping=damping, trust=1e-3
    )
    with torch.no_grad():
        before = objective.outputs(batch).log_softmax(-1)
        optimizer.step([batch])
        after = objective.outputs(batch).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    # K leaves out what couples the layers, which is at most their number times what it sees; and its labels are drawn.
    assert 3e-4 < divergence < 2 * 1e-3 * len(partition.names)


def test_factors_that_are_not_finite_end_the_run_where_it_was(monkeypatch):
    problem, partition, optimizer = fresh(solver="kfac")
    before = partition.vector(problem.model)

    def fails(*_: object) -> float:
        raise RunFailed("K-FAC: a layer's factors are not finite")

    monkeypatch.setattr(optimizer.solver, "refresh", fails)
    assert (
        optimizer.step(list(problem.batches)).outcome == "diverged: K-FAC: a layer's factors are not finite"
    )
    assert torch.equal(partition.vector(problem.model), before)


# -- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "adam"}, "no optimizer named 'adam'.*adamw.*Valid: muon, adamw, soap, shampoo, sophia, kfac, ekfac"),
        *[({"solver": s, "refresh": 0}, "refresh must be at least 1 step, got 0") for s in ("soap", "sophia", "kfac")],
        ({"solver": "muon", "refresh": 3}, "refresh 3: muon has no preconditioner.*soap, shampoo, sophia, kfac, ekfac"),
        ({"solver": "kfac", "damping": -0.1}, "damping -0.1.*must be above 0"),
        ({"solver": "kfac", "damping": 0.0}, "damping 0.0.*must be above 0"),
        ({"solver": "soap", "damping": 0.1}, "damping 0.1: soap has none"),
        ({"solver": "kfac", "trust": 0.0}, "trust must be above 0 nats per token"),
        ({"learning_rate_warmup": -1}, "learning_rate_warmup must be 0 or more steps, got -1"),
        ({"solver": "sophia", "curvature_minibatches": 0}, "curvature_minibatches must be at least 1, got 0"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        fresh(**options)


@pytest.mark.parametrize(
    ("options", "message"), [({"kind": "kfak"}, "'kfak'.*kfac, ekfac"), ({"momentum": 1.0}, r"\[0, 1\)")]
)
def test_kfacs_own_mistakes_are_named(options, message):
    problem, partition, _ = fresh()
    with pytest.raises(UserError, match=message):
        KFAC(Objective(problem.model), partition, **options)


def test_kfac_without_factors_says_so():
    problem, partition, _ = fresh()
    with pytest.raises(UserError, match="no factors yet: call refresh"):
        KFAC(Objective(problem.model), partition).step({}, 1.0, None)


def test_no_minibatch_is_a_mistake():
    _, _, optimizer = fresh()
    with pytest.raises(UserError, match="at least one minibatch"):
        optimizer.step([])
