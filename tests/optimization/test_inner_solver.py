"""Inner steps are the libraries' own on the gradients handed in, each on the parameters it is meant for; where a
library departs from its method's paper, they are the paper's, written out."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from pytorch_optimizer import SOAP, ScalableShampoo, SophiaH
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.optimization.inner_solver import INNER_SOLVERS, SOLVERS, FirstOrder, hidden_matrices
from tests.models import real

SHAPES = {"matrix": (6, 4), "square": (4, 4), "table": (5, 4), "vector": (4,)}
HIDDEN = ("matrix", "square")
REST = ("table", "vector")
RATES = [0.02, 0.015, 0.01, 0.005]


def decoder(**switches: bool | str) -> nn.Module:
    config = DecoderConfig(
        layers=2, width=8, feedforward=12, heads=2, vocabulary=11, context=4, **switches  # type: ignore[arg-type]
    )  # fmt: skip
    return Decoder(config, generator=torch.Generator().manual_seed(0))


def drawn(seed: int) -> dict[str, Tensor]:
    """Returns float32 tensors by name."""
    g = torch.Generator().manual_seed(seed)
    return {name: real(g, *shape).float() for name, shape in SHAPES.items()}


def picked(tensors: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    return [tensors[name] for name in names]


def saved(state: Any) -> Any:
    """Returns a state as a checkpoint gives it back: tensors and plain values alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def step(solver: FirstOrder, i: int, rate: float, clip: float | None = None, period: int = 2) -> float:
    """Takes the i-th step on drawn(10 + i); sophia gets an estimate of diag(G) every `period` steps."""
    diagonal = {name: 300 * x.square() for name, x in drawn(50 + i).items()}
    given = diagonal if solver.solver == "sophia" and i % period == 0 else None
    return solver.step(drawn(10 + i), rate, clip, diagonal=given)


def torch_steps(optimizers: list[torch.optim.Optimizer], parameters: dict[str, Tensor], rates: list[float]):
    """Takes torch's own steps on the gradients drawn(10), drawn(11), ...; every optimizer knows its parameters."""
    for i, rate in enumerate(rates):
        for name, gradient in drawn(10 + i).items():
            parameters[name].grad = gradient
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()


@pytest.mark.parametrize("switches", [{}, {"tied": True}, {"mlp": "swiglu", "norm": "layernorm"}], ids=str)
def test_hidden_matrices_are_those_inside_the_blocks(switches):
    model = decoder(**switches)
    wanted = {
        name
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    assert {name.removesuffix(".weight") for name in hidden_matrices(model)} == wanted
    assert len(wanted) == 2 * (7 if "mlp" in switches else 6)


def test_position_tables_are_no_hidden_matrices():
    model = nn.ModuleDict(
        {
            "wte": nn.Embedding(9, 4),
            "wpe": nn.Embedding(6, 4),
            "h": nn.ModuleList([nn.Linear(4, 4)]),
            "ln_f": nn.LayerNorm(4),
            "lm_head": nn.Linear(4, 9, bias=False),
        }
    )
    assert hidden_matrices(model) == ("h.0.weight",)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    ours, theirs = drawn(1), drawn(1)
    solver = FirstOrder("muon", ours, HIDDEN)
    norms = [step(solver, i, rate) for i, rate in enumerate(RATES)]
    muon = torch.optim.Muon(picked(theirs, HIDDEN), momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW(picked(theirs, REST), betas=(0.9, 0.999), weight_decay=0.0)
    torch_steps([muon, adamw], theirs, RATES)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
    first = torch.cat([g.reshape(-1) for g in drawn(10).values()])
    assert norms[0] == pytest.approx(
        float(first.double().norm()), rel=1e-5
    )  # squares are added up in float32


def test_adamw_takes_everything():
    ours, theirs = drawn(1), drawn(1)
    solver = FirstOrder("adamw", ours, HIDDEN, weight_decay=0.1)
    for i, rate in enumerate([0.02, 0.01]):
        solver.step(drawn(10 + i), rate, None)
    adamw = torch.optim.AdamW(list(theirs.values()), weight_decay=0.1)
    torch_steps([adamw], theirs, [0.02, 0.01])
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping_bounds_the_norm_over_all_gradients_together(clip):
    ours, theirs = drawn(1), drawn(1)
    norm = FirstOrder("adamw", ours, ()).step(drawn(10), 0.1, clip)
    total = float(torch.cat([g.reshape(-1) for g in drawn(10).values()]).double().norm())
    assert norm == pytest.approx(total, rel=1e-5)  # as it was before clipping
    clipped = {name: g * min(1.0, clip / total) for name, g in drawn(10).items()}
    FirstOrder("adamw", theirs, ()).step(clipped, 0.1, None)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("refresh", [1, 3])
def test_soap_is_the_librarys_and_only_builds_its_basis_at_first(refresh):
    ours, theirs, start = drawn(1), drawn(1), drawn(1)
    solver = FirstOrder("soap", ours, HIDDEN, weight_decay=0.1, refresh=refresh)
    rates = [*RATES, *RATES]
    step(solver, 0, rates[0])
    assert all(torch.equal(ours[name], start[name]) for name in HIDDEN)
    assert not any(torch.equal(ours[name], start[name]) for name in REST)
    for i, rate in enumerate(rates[1:], 1):
        step(solver, i, rate)
    soap = SOAP(picked(theirs, HIDDEN), betas=(0.95, 0.95), weight_decay=0.1, precondition_frequency=refresh)
    adamw = torch.optim.AdamW(picked(theirs, REST), weight_decay=0.1)
    torch_steps([soap, adamw], theirs, rates)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
    assert not any(torch.equal(ours[name], start[name]) for name in SHAPES)


def shampoo_by_the_paper(steps: int, refresh: int, decay: float) -> dict[str, Tensor]:
    """Returns where L^(-1/4) g R^(-1/4), grafted to sign(g)'s norm and averaged, leads in float64."""
    found = {}
    for name in HIDDEN:
        x = drawn(1)[name].double()
        left, right = (1e-6 * torch.eye(n, dtype=torch.float64) for n in x.shape)
        mean, inner, outer = torch.zeros_like(x), torch.eye(1), torch.eye(1)
        for i in range(steps):
            g = drawn(10 + i)[name].double()
            left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
            if i % refresh == 0:
                inner, outer = fourth_root(left), fourth_root(right)
            u = inner @ g @ outer
            mean = 0.95 * mean + 0.05 * u * (math.sqrt(g.numel()) / u.norm())
            x = (1 - RATES[i] * decay) * x - RATES[i] * mean / (1 - 0.95 ** (i + 1))
        found[name] = x
    return found


def fourth_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * (values + 1e-6 * values.max()) ** -0.25 @ vectors.T


@pytest.mark.parametrize("refresh", [1, 2])
def test_shampoo_is_the_papers_grafted_and_without_bias(refresh):
    ours = drawn(1)
    solver = FirstOrder("shampoo", ours, HIDDEN, weight_decay=0.1, refresh=refresh)
    for i, rate in enumerate(RATES):
        step(solver, i, rate)
    for name, wanted in shampoo_by_the_paper(len(RATES), refresh, 0.1).items():
        # The library's inverse root iterates to 1e-3.
        torch.testing.assert_close(ours[name].double(), wanted, rtol=0, atol=2e-2 * sum(RATES))
        moved = (wanted - drawn(1)[name].double()).norm()
        assert float((ours[name].double() - wanted).norm() / moved) < 5e-3


def test_shampoo_steps_are_the_librarys_own():
    ours, theirs = drawn(1), drawn(1)
    solver = FirstOrder("shampoo", ours, HIDDEN)
    for i, rate in enumerate(RATES):
        step(solver, i, rate)
    library = ScalableShampoo(
        picked(theirs, HIDDEN), betas=(0.95, 0.95), moving_average_for_momentum=True, nesterov=False, graft_type=4,
        start_preconditioning_step=1, preconditioning_compute_steps=1, shape_interpretation=False,
    )  # fmt: skip
    adamw = torch.optim.AdamW(picked(theirs, REST), weight_decay=0.0)
    with torch.random.fork_rng():
        for i, rate in enumerate(RATES):
            for name, gradient in drawn(10 + i).items():
                theirs[name].grad = gradient
            library.param_groups[0]["lr"] = rate / (1 - 0.95 ** (i + 1))
            adamw.param_groups[0]["lr"] = rate
            torch.manual_seed(i)
            library.step()
            adamw.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_sophia_is_the_papers_for_every_parameter():
    ours = drawn(1)
    solver = FirstOrder("sophia", ours, HIDDEN, weight_decay=0.1)
    for i, rate in enumerate(RATES):
        step(solver, i, rate)
    inside = []
    for name in SHAPES:
        x = drawn(1)[name].double()
        m, h = torch.zeros_like(x), torch.zeros_like(x)
        for i, rate in enumerate(RATES):
            m = 0.96 * m + 0.04 * drawn(10 + i)[name].double()
            if i % 2 == 0:
                h = 0.99 * h + 0.01 * (300 * drawn(50 + i)[name].square()).double()
            ratio = m / (0.05 * h).clamp_min(1e-12)
            inside.append(bool((ratio.abs() < 1).any()))
            x = (1 - rate * 0.1) * x - rate * ratio.clamp(-1, 1)
        torch.testing.assert_close(ours[name].double(), x, rtol=1e-5, atol=1e-6)
    assert sum(inside) > len(inside) / 2  # or the curvature would not have been tested, only signs
    assert not any("hessian" in state for state in solver.optimizers[0].state.values())


def test_sophia_steps_are_the_librarys_own():
    ours, theirs = drawn(1), drawn(1)
    solver = FirstOrder("sophia", ours, HIDDEN)
    step(solver, 0, 0.01)
    library = SophiaH(list(theirs.values()), lr=0.01 / 0.05, betas=(0.96, 0.99), p=0.05)
    for name, gradient in drawn(10).items():
        theirs[name].grad = gradient
    library.step(hessian=[300 * x.square() for x in drawn(50).values()])
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_sophia_says_that_it_needs_an_estimate():
    ours = drawn(1)
    with pytest.raises(UserError, match="estimate of diag.*muon, adamw, soap, shampoo"):
        FirstOrder("sophia", ours, HIDDEN).step(drawn(10), 0.1, None)
    assert all(torch.equal(ours[name], x) and ours[name].grad is None for name, x in drawn(1).items())


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_handed_in_and_the_global_generator_stay_as_they_are(name):
    ours, gradients, state = drawn(1), drawn(10), torch.get_rng_state()
    solver = FirstOrder(name, ours, HIDDEN, weight_decay=0.1)
    diagonal = {n: x.square() for n, x in drawn(50).items()}
    for _ in range(2):  # SOAP's first step does nothing
        solver.step(gradients, 0.1, None, diagonal=diagonal)
    assert all(torch.equal(gradients[n], kept) for n, kept in drawn(10).items())
    assert all(torch.equal(diagonal[n], kept.square()) for n, kept in drawn(50).items())
    assert all(p.grad is None for p in ours.values())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_saved_solver_goes_on_bit_for_bit(name, before, refresh):
    options = {} if name in ("muon", "adamw", "sophia") else {"refresh": refresh}
    ours = drawn(1)
    solver = FirstOrder(name, ours, HIDDEN, weight_decay=0.1, **options)
    for i in range(before):
        step(solver, i, 0.02, 1.0)
    state, there = saved(solver.state_dict()), {n: p.clone() for n, p in ours.items()}
    again = FirstOrder(name, there, HIDDEN, weight_decay=0.1, **options)
    again.load_state_dict(state)
    for i in range(before, before + 3):
        rate = 0.02 / (i + 1)
        assert step(solver, i, rate, 1.0) == step(again, i, rate, 1.0)
    assert all(torch.equal(ours[n], there[n]) for n in SHAPES)
    assert not any(torch.equal(ours[n], drawn(1)[n]) for n in SHAPES)


@pytest.mark.parametrize("name", INNER_SOLVERS)
def test_a_group_without_matrices_or_without_a_rest_is_no_trouble(name):
    for names in (REST, HIDDEN):
        ours = {n: x for n, x in drawn(1).items() if n in names}
        solver = FirstOrder(name, ours, HIDDEN)
        for i in range(2):
            solver.step({n: x for n, x in drawn(10 + i).items() if n in names}, 0.1, 1.0)
        assert not any(torch.equal(ours[n], drawn(1)[n]) for n in names)


def test_an_unknown_solver_is_named_with_the_valid_ones():
    with pytest.raises(UserError, match="no inner solver named 'sgd'.*muon, adamw, soap, shampoo, sophia"):
        FirstOrder("sgd", drawn(1), HIDDEN)


@pytest.mark.parametrize("name", ["soap", "shampoo", "sophia"])
def test_refresh_counts_steps(name):
    with pytest.raises(UserError, match="refresh must be at least 1 step, got 0"):
        FirstOrder(name, drawn(1), HIDDEN, refresh=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_refresh_is_a_mistake_where_nothing_is_refreshed(name):
    with pytest.raises(UserError, match=f"refresh 5: {name} has no preconditioner.*soap, shampoo, sophia"):
        FirstOrder(name, drawn(1), HIDDEN, refresh=5)
