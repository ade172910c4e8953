"""A candidate answers a gradient as its method really would: the optimizers as their own libraries step from the same
state, K-FAC and the diagonal as the inverses of the matrices they stand for; and nothing it looks at is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import SOAP, ScalableShampoo, SophiaH
from torch import Tensor, nn

from hessprobe.curvature.kronecker import kronecker_factors
from hessprobe.errors import UserError
from hessprobe.optimization.baselines import BASELINES, FirstOrderOptimizer
from hessprobe.optimization.inner_solver import FirstOrder
from hessprobe.optimization.kfac import KFAC
from hessprobe.optimization.optimizer_steps import OPTIMIZERS
from hessprobe.optimization.place import Direction, Place
from hessprobe.optimization.running import RunningOptimizer, running_optimizer
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.instruments.preconditioner.asking import BUILT, directions
from tests.models import Problem, labels, real, redraw, seeded

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")
RATE = 0.01
DAMPINGS = (0.1, 0.01)
DAMPED = ("kfac", "ekfac", "diagonal_gn")


def placed(problem: Problem, **changes) -> Place:
    """Returns the place of a problem at its own theta, with the gradient of its own batches."""
    objective, partition = Objective(problem.model, loss=problem.loss), Partition.of(problem.model)
    batches = list(problem.batches)
    given = {
        "objective": objective,
        "partition": partition,
        "parameters": partition.vector(problem.model),
        "batches": batches,
        "gradient": objective.gradient(batches, partition)[1],
    }
    return Place(**(given | changes))


def decoder(sequences: int = 8, seed: int = 3) -> Problem:
    """Returns the zoo's decoder on a batch of its own size, some of whose targets are ignored."""
    g = seeded(seed)
    model = models.ZOO["decoder_tied"](g).model
    x = torch.randint(7, (sequences, 4), generator=g)
    return Problem(model, [(x, labels(g, 7, sequences, 4, ignore=0.2))], "cross_entropy")


def towards(name: str, place: Place, running: RunningOptimizer | None = None, seed: int = 5) -> Tensor:
    """Returns the direction of a candidate that has no damping of its own, which it gives for each of them."""
    found = directions(name, place, DAMPINGS, generator=seeded(seed), running=running)
    assert len(found) == len(DAMPINGS) and found[0] is found[1] and found[0].inverse is None
    return found[0].vector


def is_hidden(name: str) -> bool:
    return name.startswith("blocks.") and "norm" not in name


def drawn(place: Place, seed: int) -> Tensor:
    """Returns something like a gradient (p,), of full rank in every matrix, where rounding decides nothing."""
    return 0.1 * real(seeded(seed), place.partition.size)


# -- optimizers, against their libraries' own step -----------------------------------------------------------


def library_steps(candidate: str, place: Place, history: list[Tensor], refresh: int = 1) -> Tensor:
    """Returns the last step of torch's and pytorch_optimizer's own optimizers on the gradients in turn, over RATE.

    Sophia's diag(G) is `curvature_of` every `refresh`-th step's gradient. Every step but the last has weight decay.
    """
    model = copy.deepcopy(place.objective.model)
    parameters = dict(model.named_parameters())
    hidden = [p for name, p in parameters.items() if is_hidden(name) and candidate not in ("adam", "sophia")]
    others = [p for p in parameters.values() if not any(p is q for q in hidden)]
    make: dict[str, Callable[[], list[torch.optim.Optimizer]]] = {
        "adam": list,
        "sophia": lambda: [SophiaH(others, lr=RATE / 0.05, betas=(0.96, 0.99), p=0.05, update_period=2**62)],
        "muon": lambda: [torch.optim.Muon(hidden, lr=RATE, momentum=0.95, weight_decay=0.1)],
        "soap": lambda: [
            SOAP(hidden, lr=RATE, betas=(0.95, 0.95), weight_decay=0.1, precondition_frequency=refresh)
        ],
        "shampoo": lambda: [
            ScalableShampoo(
                hidden, betas=(0.95, 0.95), moving_average_for_momentum=True, nesterov=False, graft_type=4,
                start_preconditioning_step=1, shape_interpretation=False, weight_decay=0.0,
            )
        ],
    }  # fmt: skip
    optimizers = make[candidate]()
    if candidate != "sophia":
        optimizers.append(torch.optim.AdamW(others, lr=RATE, weight_decay=0.1))
    before = place.partition.vector(model)
    for i, gradient in enumerate(history):
        for name, g in place.partition.unflatten(gradient).items():
            parameters[name].grad = g.clone()
        before = place.partition.vector(model)
        for optimizer in optimizers:
            if i == len(history) - 1:
                optimizer.param_groups[0]["weight_decay"] = 0.0
            if isinstance(optimizer, SophiaH):
                curvature = place.partition.unflatten(curvature_of(gradient))
                due = i % refresh == 0
                optimizer.step(hessian=[curvature[name] for name in parameters] if due else None)
                for state in optimizer.state.values():
                    state.pop("hessian", None)
            elif isinstance(optimizer, ScalableShampoo):
                optimizer.preconditioning_compute_steps = 1 if i % refresh == 0 else 2**62
                optimizer.param_groups[0]["lr"] = RATE / (1 - 0.95 ** (i + 1))
                with torch.random.fork_rng():
                    torch.manual_seed(i)
                    optimizer.step()
            else:
                optimizer.step()
    return (place.partition.vector(model) - before) / RATE


def curvature_of(gradient: Tensor) -> Tensor:
    return 300 * gradient.square()


def state_after(candidate: str, place: Place, history: list[Tensor], refresh: int) -> RunningOptimizer:
    """Returns a run's optimizer, with weight decay, that has taken steps on the gradients in turn."""
    options: dict[str, Any] = {"refresh": refresh} if candidate in ("soap", "shampoo", "sophia") else {}
    optimizer = FirstOrderOptimizer(
        Objective(copy.deepcopy(place.objective.model)), place.partition, solver=OPTIMIZERS[candidate],
        learning_rate=RATE, weight_decay=0.1, **options,
    )  # fmt: skip
    assert isinstance(optimizer.solver, FirstOrder)
    for i, gradient in enumerate(history):
        due = candidate == "sophia" and i % refresh == 0
        optimizer.solver.step(
            place.partition.unflatten(gradient),
            RATE,
            None,
            diagonal=place.partition.unflatten(curvature_of(gradient)) if due else None,
        )
    found = running_optimizer(optimizer)
    assert found is not None
    return found


@pytest.mark.parametrize(("before", "refresh"), [(3, 2), (4, 3)])
@pytest.mark.parametrize("candidate", OPTIMIZERS)
def test_it_is_the_librarys_own_step_from_the_state_of_the_run(candidate, before, refresh):
    place = placed(decoder())
    history = [drawn(place, 10 + i) for i in range(before)]
    place = placed(decoder(), gradient=drawn(place, 99))
    got = towards(candidate, place, state_after(candidate, place, history, refresh))
    wanted = library_steps(candidate, place, [*history, place.gradient], refresh)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    assert float(got.norm()) > 0.1


def test_sophias_curvature_is_estimated_at_the_place_when_it_is_due():
    place = placed(decoder())
    history = [drawn(place, 10 + i) for i in range(2)]
    running = state_after("sophia", place, history, 2)
    (found, _) = directions("sophia", place, DAMPINGS, generator=seeded(5), running=running)
    momentum, curvature = torch.zeros_like(place.gradient), torch.zeros_like(place.gradient)
    for gradient in (*history, place.gradient):
        momentum = 0.96 * momentum + 0.04 * gradient
    for estimate in (curvature_of(history[0]), place.diagonal(seeded(5))):
        curvature = 0.99 * curvature + 0.01 * estimate
    wanted = -(momentum / (0.05 * curvature).clamp_min(1e-13)).clamp(-1, 1)
    torch.testing.assert_close(found.vector, wanted, rtol=1e-8, atol=1e-10)
    assert found.gradients == place.diagonal_cost
    assert 0.05 < float((wanted.abs() < 1).double().mean()) < 1  # or the curvature would not have been tested


def quarters(place: Place) -> list[Tensor]:
    """Returns the gradients of the four quarters of the place's one batch."""
    ((x, y),) = place.batches
    size = len(x) // 4
    cuts = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    return [place.objective.gradient([cut], place.partition)[1] for cut in cuts]


@pytest.mark.parametrize("candidate", [name for name in OPTIMIZERS if name != "sophia"])
def test_without_a_run_its_averages_are_filled_by_pieces_of_the_batch(candidate):
    place = placed(decoder())
    refresh = 2 if candidate == "shampoo" else 1
    (found, _) = directions(candidate, place, DAMPINGS, generator=seeded(5))
    wanted = library_steps(candidate, place, [*quarters(place), place.gradient], refresh)
    torch.testing.assert_close(found.vector, wanted, rtol=1e-7, atol=1e-8)
    assert found.gradients == 1.0
    assert float(found.vector @ place.gradient) < 0


def test_without_a_run_sophia_has_the_batchs_gradient_and_curvature():
    place = placed(decoder())
    (found, _) = directions("sophia", place, DAMPINGS, generator=seeded(5))
    wanted = -(place.gradient / (0.05 * place.diagonal(seeded(5))).clamp_min(1e-13)).clamp(-1, 1)
    torch.testing.assert_close(found.vector, wanted, rtol=1e-8, atol=1e-10)
    assert found.gradients == place.diagonal_cost


@pytest.mark.parametrize("candidate", OPTIMIZERS)
def test_one_sequence_is_enough_to_fill_them(candidate):
    place = placed(decoder(sequences=1))
    d = towards(candidate, place)
    assert bool(d.isfinite().all()) and float(d @ place.gradient) < 0


@pytest.mark.parametrize("solver", BASELINES)
def test_it_is_the_update_that_the_run_then_makes(solver):
    problem = models.ZOO["decoder_ragged"](seeded(7))
    objective, partition = Objective(problem.model), Partition.of(problem.model)
    options: dict[str, Any] = {} if solver in ("adamw", "muon") else {"refresh": 3}
    options |= {"damping": 0.03, "trust": 0.002} if solver in ("kfac", "ekfac") else {}
    optimizer = FirstOrderOptimizer(
        objective, partition, solver=solver, learning_rate=RATE, clip=None, weight_decay=0.0, **options
    )
    optimizer.step(list(problem.batches))
    before, running = partition.vector(problem.model), running_optimizer(optimizer)
    place = placed(problem)
    optimizer.step(list(problem.batches))
    update = partition.vector(problem.model) - before
    name = {"adamw": "adam"}.get(solver, solver)
    # By now the model has moved on: what counts is the place.
    torch.testing.assert_close(RATE * towards(name, place, running), update, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_running_kfac_takes_its_factors_from_the_place_when_they_are_due(kind):
    problem = decoder()
    place = placed(problem)
    optimizer = FirstOrderOptimizer(
        place.objective, place.partition, solver=kind, learning_rate=RATE, damping=0.03, trust=None
    )
    optimizer.step(list(problem.batches))
    assert isinstance(optimizer.solver, KFAC)
    mean = {name: x.clone() for name, x in optimizer.solver.mean.items()}
    place = placed(problem, gradient=drawn(place, 1))
    (found, _) = directions(kind, place, DAMPINGS, generator=seeded(5), running=running_optimizer(optimizer))
    factors = kronecker_factors(
        place.objective, place.batches, place.partition, kind=kind, generator=seeded(5)
    )
    gradients, got = (place.partition.unflatten(x) for x in (place.gradient, found.vector))
    smoothed = {name: (0.9 * x + 0.1 * gradients[name]) / (1 - 0.9**2) for name, x in mean.items()}
    for name, step in factors.apply_inverse(smoothed, damping=0.03).items():
        torch.testing.assert_close(got[name], -step, rtol=1e-8, atol=1e-10)
    assert found.gradients == pytest.approx(factors.gradient_equivalents)


@pytest.mark.parametrize("candidate", [*OPTIMIZERS, "kfac", "ekfac"])
def test_a_run_of_another_kind_or_without_a_step_does_not_count(candidate):
    place = placed(decoder())
    solver = str(OPTIMIZERS.get(candidate, candidate))
    fresh = FirstOrderOptimizer(place.objective, place.partition, solver=solver, learning_rate=RATE)
    other = FirstOrderOptimizer(
        place.objective, place.partition, solver="muon" if solver == "adamw" else "adamw", learning_rate=RATE
    )
    other.solver.step(place.partition.unflatten(drawn(place, 1)), 0.0, None)
    for running in (running_optimizer(fresh), running_optimizer(other)):
        assert running is not None
        for one, wanted in zip(
            directions(candidate, place, DAMPINGS, generator=seeded(5), running=running),
            directions(candidate, place, DAMPINGS, generator=seeded(5)),
            strict=True,
        ):
            assert torch.equal(one.vector, wanted.vector)


# -- matrices with an inverse --------------------------------------------------------------------------------


def dense_inverse(found: Direction, size: int) -> Tensor:
    assert found.inverse is not None
    return found.inverse(torch.eye(size, dtype=torch.float64))


def test_the_gradient_goes_downhill_as_it_is():
    problem = models.ZOO["mlp_classifier"](seeded(3))
    place = placed(problem)
    one, other = directions("gradient", place, DAMPINGS, generator=seeded(0))
    truth = oracles.dense(*problem).in_order(place.partition.names)
    torch.testing.assert_close(one.vector, -truth.gradient, rtol=1e-10, atol=1e-14)
    assert one is other and one.gradients == 0
    assert torch.equal(dense_inverse(one, place.partition.size), torch.eye(place.partition.size).double())


@pytest.mark.parametrize("name", DAMPED)
@pytest.mark.parametrize("problem", ["decoder_tied", "decoder_ragged", "mlp_classifier"])
def test_the_inverse_is_of_a_damped_symmetric_positive_matrix_that_is_one_for_all_dampings(name, problem):
    place = placed(models.ZOO[problem](seeded(3)))
    found = directions(name, place, DAMPINGS, generator=seeded(5))
    undamped = []
    for direction, damping in zip(found, DAMPINGS, strict=True):
        inverse = dense_inverse(direction, place.partition.size)
        torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=1e-10)
        torch.testing.assert_close(direction.vector, -inverse @ place.gradient, rtol=1e-9, atol=1e-12)
        matrix = torch.linalg.inv(inverse) - damping * torch.eye(len(inverse)).double()
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-8
        undamped.append(matrix)
    torch.testing.assert_close(*undamped, rtol=0, atol=1e-8 * float(undamped[0].abs().max()))
    assert found[0].gradients > 0 and found[1].gradients == 0


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_kfac_is_its_factors_and_the_diagonal_where_it_has_none(kind):
    place = placed(decoder())
    generator = seeded(5)
    factors = kronecker_factors(
        place.objective, place.batches, place.partition, kind=kind, generator=generator
    )
    diagonal = place.partition.unflatten(place.diagonal(generator))
    found = directions(kind, place, DAMPINGS, generator=seeded(5))
    gradients = place.partition.unflatten(place.gradient)
    rest = set(gradients) - set(factors.names)
    assert factors.names and any("embedding" in name for name in rest)
    for direction, damping in zip(found, DAMPINGS, strict=True):
        wanted = factors.apply_inverse(gradients, damping=damping)
        wanted |= {name: gradients[name] / (diagonal[name] + damping) for name in rest}
        torch.testing.assert_close(-direction.vector, place.partition.flatten(wanted), rtol=1e-9, atol=1e-12)
    assert found[0].gradients == pytest.approx(factors.gradient_equivalents + place.diagonal_cost)


def test_kfac_alone_costs_its_factors_alone():
    place = placed(models.ZOO["mlp_regression"](seeded(3)))
    factors = kronecker_factors(place.objective, place.batches, place.partition, generator=seeded(5))
    (found,) = directions("kfac", place, [0.1], generator=seeded(5))
    assert set(factors.names) == set(place.partition.names)
    assert found.gradients == pytest.approx(factors.gradient_equivalents / len(place.batches))


def test_the_diagonal_is_gauss_newtons_with_the_error_that_is_stated():
    g = seeded(2)
    model, x = redraw(nn.Sequential(nn.Linear(3, 5, bias=False)), g), real(g, 320, 3)
    place = placed(Problem(model, [(x, labels(g, 5, 320))], "cross_entropy"))
    exact = oracles.softmax_regression_curvature(x, model.get_parameter("0.weight").detach()).diagonal()
    found = [directions("diagonal_gn", place, [0.5], generator=g)[0] for _ in range(80)]
    draws = torch.stack([-place.gradient / direction.vector - 0.5 for direction in found])
    z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))
    assert float(z.square().mean()) < 2 and float(z.abs().max()) < 4
    assert float((draws.std(0) / exact).mean()) == pytest.approx(0.25, abs=0.03)
    assert found[0].gradients == 2.0


# -- what it leaves behind, and what it reads ----------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT)
def test_model_run_and_global_generator_stay_as_they_were(name):
    problem = decoder()
    place = placed(problem)
    running = None
    if name in OPTIMIZERS:
        running = state_after(name, place, [drawn(place, i) for i in range(2)], 2)
    elif name in ("kfac", "ekfac"):
        optimizer = FirstOrderOptimizer(
            Objective(copy.deepcopy(problem.model)), place.partition, solver=name, learning_rate=RATE
        )
        optimizer.step(list(problem.batches))
        running = running_optimizer(optimizer)
    kept = copy.deepcopy(running)
    problem.model.train()
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)
    before, generator = copy.deepcopy(problem.model.state_dict()), torch.get_rng_state()
    gradient, theta = place.gradient.clone(), place.parameters.clone()
    for given in (None, running):
        directions(name, place, DAMPINGS, generator=seeded(5), running=given)
    assert all(torch.equal(x, before[n]) for n, x in problem.model.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in problem.model.parameters())
    assert all(module.training and not module._forward_hooks for module in problem.model.modules())
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(gradient, place.gradient) and torch.equal(theta, place.parameters)
    if running is not None:
        torch.testing.assert_close(running.state, kept.state, rtol=0, atol=0)  # type: ignore[union-attr]
        again = [directions(name, place, [0.1], generator=seeded(5), running=running)[0] for _ in range(2)]
        assert torch.equal(again[0].vector, again[1].vector)


@pytest.mark.parametrize("name", BUILT)
def test_the_place_counts_not_where_the_model_stands(name):
    problem = decoder()
    here = directions(name, placed(problem), DAMPINGS, generator=seeded(5))
    place = placed(problem)
    place.partition.assign(problem.model, place.parameters + 0.3)
    there = directions(name, place, DAMPINGS, generator=seeded(5))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.vector, other.vector)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "kfac"])
def test_parameters_that_do_not_train_have_no_direction(name):
    place = placed(models.ZOO["frozen_layer"](seeded(3)))
    assert directions(name, place, [0.1], generator=seeded(5))[0].vector.shape == (place.partition.size,)


def test_pieces_are_the_batches_cut_without_those_that_carry_no_target():
    g = seeded(1)
    x, y = torch.randint(7, (6, 4), generator=g), labels(g, 7, 6, 4)
    y[2:4] = models.IGNORED
    model = models.ZOO["decoder"](seeded(3)).model
    place = placed(Problem(model, [(x[:4], y[:4]), (x[4:], y[4:])], "cross_entropy"))
    for count in (1, 3, 4, 16):
        pieces = place.pieces(count)
        rows = torch.cat([inputs for piece in pieces for inputs, _ in piece])
        kept = torch.cat([targets for piece in pieces for _, targets in piece])
        assert len(pieces) == min(count, 4 if count == 16 else 3 if count == 4 else count)
        assert int((kept != models.IGNORED).sum()) == int((y != models.IGNORED).sum())
        assert {tuple(row) for row in x[[0, 1, 4, 5]].tolist()} <= {tuple(row) for row in rows.tolist()}


# -- mistakes ------------------------------------------------------------------------------------------------


def test_an_unknown_candidate_is_named_with_the_valid_ones():
    with pytest.raises(
        UserError, match="no candidate named 'sgd'.*gradient, update, adam, sophia.*diagonal_gn"
    ):
        directions("sgd", placed(decoder()), DAMPINGS, generator=seeded(0))


def test_losses_and_models_a_candidate_cannot_take_are_named():
    place = placed(models.ZOO["custom_loss"](seeded(3)))
    for name in ("sophia", "diagonal_gn", "kfac"):
        with pytest.raises(UserError, match="got logcosh"):
            directions(name, place, DAMPINGS, generator=seeded(0))
