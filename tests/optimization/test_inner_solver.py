"""Inner steps are torch's own Muon and AdamW on the gradients handed in, each on the parameters it is meant for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.optimization.inner_solver import FirstOrder, hidden_matrices
from hessprobe.problem.transformer import Decoder, DecoderConfig
from tests.models import real

SHAPES = {"matrix": (6, 4), "table": (5, 4), "vector": (4,)}
HIDDEN = ("matrix",)


def decoder(**switches: bool | str) -> nn.Module:
    config = DecoderConfig(
        layers=2, width=8, feedforward=12, heads=2, vocabulary=11, context=4, **switches  # type: ignore[arg-type]
    )  # fmt: skip
    return Decoder(config, generator=torch.Generator().manual_seed(0))


def drawn(seed: int) -> dict[str, Tensor]:
    """Returns float32 tensors by name."""
    g = torch.Generator().manual_seed(seed)
    return {name: real(g, *shape).float() for name, shape in SHAPES.items()}


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
    rates = [0.02, 0.015, 0.01]
    norms = [solver.step(drawn(10 + i), rate, None) for i, rate in enumerate(rates)]
    muon = torch.optim.Muon([theirs["matrix"]], momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW([theirs["table"], theirs["vector"]], betas=(0.9, 0.999), weight_decay=0.0)
    torch_steps([muon, adamw], theirs, rates)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
    first = torch.cat([g.reshape(-1) for g in drawn(10).values()])
    assert norms[0] == pytest.approx(float(first.norm()), rel=1e-6)


def test_adamw_takes_everything():
    ours, theirs = drawn(1), drawn(1)
    solver = FirstOrder("adamw", ours, HIDDEN, betas=(0.8, 0.95), weight_decay=0.1)
    for i, rate in enumerate([0.02, 0.01]):
        solver.step(drawn(10 + i), rate, None)
    adamw = torch.optim.AdamW(list(theirs.values()), betas=(0.8, 0.95), weight_decay=0.1)
    torch_steps([adamw], theirs, [0.02, 0.01])
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping_bounds_the_norm_over_all_gradients_together(clip):
    ours, theirs = drawn(1), drawn(1)
    norm = FirstOrder("adamw", ours, ()).step(drawn(10), 0.1, clip)
    total = float(torch.cat([g.reshape(-1) for g in drawn(10).values()]).norm())
    assert norm == pytest.approx(total, rel=1e-6)  # as it was before clipping
    clipped = {name: g * min(1.0, clip / total) for name, g in drawn(10).items()}
    FirstOrder("adamw", theirs, ()).step(clipped, 0.1, None)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name])


def test_gradients_handed_in_stay_as_they_are_and_none_stay_behind():
    ours, gradients = drawn(1), drawn(10)
    FirstOrder("muon", ours, HIDDEN).step(gradients, 0.1, 0.5)
    assert all(torch.equal(gradients[name], kept) for name, kept in drawn(10).items())
    assert all(p.grad is None for p in ours.values())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_saved_solver_goes_on_bit_for_bit(name):
    ours = drawn(1)
    solver = FirstOrder(name, ours, HIDDEN)
    solver.step(drawn(10), 0.02, 1.0)
    saved, there = copy.deepcopy(solver.state_dict()), {n: p.clone() for n, p in ours.items()}
    solver.step(drawn(11), 0.02, 1.0)
    again = FirstOrder(name, there, HIDDEN)
    again.load_state_dict(saved)
    again.step(drawn(11), 0.02, 1.0)
    assert all(torch.equal(ours[n], there[n]) for n in SHAPES)


def test_an_unknown_solver_is_named_with_the_valid_ones():
    with pytest.raises(UserError, match="no inner solver named 'sgd'.*muon, adamw"):
        FirstOrder("sgd", drawn(1), HIDDEN)
