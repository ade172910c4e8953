"""torch's optimizers are read as ours only where ours, in their state, would take the very step that they take."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessprobe as hp
from hessprobe.any_loop.torch_optimizers import running
from hessprobe.optimization.inner_solver import FirstOrder, hidden_matrices
from hessprobe.problem.partition import Partition
from tests import models

RATE = 1e-2
BETAS = (0.8, 0.95)


def decoder() -> nn.Module:
    return models.ZOO["decoder"](models.seeded(0)).model


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the matrices inside blocks, and everything else, in an order of their own."""
    hidden = hidden_matrices(model)
    named = dict(model.named_parameters())
    return [named[n] for n in hidden], [p for n, p in reversed(named.items()) if n not in hidden]


def one_adamw(model: nn.Module) -> list[Any]:
    return [torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=1e-6, weight_decay=0.0)]


def adam_in_groups(model: nn.Module) -> list[Any]:
    groups = [{"params": part, "weight_decay": 0.0} for part in split(model)]
    return [torch.optim.Adam(groups, lr=RATE, betas=BETAS)]


def two_wrapped(model: nn.Module) -> list[Any]:
    return [
        SimpleNamespace(optimizer=torch.optim.AdamW(part, lr=RATE, weight_decay=0.0)) for part in split(model)
    ]


def muon_beside_adamw(model: nn.Module) -> list[Any]:
    matrices, rest = split(model)
    return [
        torch.optim.AdamW(rest, lr=RATE, weight_decay=0.0),
        torch.optim.Muon(matrices, lr=RATE, momentum=0.8, weight_decay=0.0),
    ]


ALIKE: dict[str, tuple[Callable[[nn.Module], list[Any]], str]] = {
    "one AdamW": (one_adamw, "adamw"),
    "an Adam in groups": (adam_in_groups, "adamw"),
    "two wrapped AdamWs": (two_wrapped, "adamw"),
    "Muon beside AdamW": (muon_beside_adamw, "muon"),
}


def backward(model: nn.Module, seed: int) -> None:
    generator = models.seeded(seed)
    x, y = (torch.randint(7, (2, 5), generator=generator) for _ in range(2))
    model.zero_grad()
    cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()


@pytest.mark.parametrize("name", ALIKE)
def test_a_copy_of_the_state_takes_the_step_that_the_optimizer_takes(name):
    make, solver = ALIKE[name]
    model = decoder()
    partition, optimizers = Partition.of(model), make(model)
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    for seed in range(3):
        backward(model, seed)
        for optimizer in inner:
            optimizer.step()
    found = running(optimizers, model, partition)
    assert found is not None and found.solver == solver
    backward(model, 9)
    own = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    ours = FirstOrder(solver, own, hidden_matrices(model))
    ours.load_state_dict(found.state)
    ours.step({n: p.grad.clone() for n, p in model.named_parameters()}, RATE, None)  # type: ignore[union-attr]
    for optimizer in inner:
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(own[n], p, rtol=0, atol=1e-15)


def test_the_copy_does_not_follow_the_optimizer():
    model = decoder()
    (optimizer,) = one_adamw(model)
    backward(model, 0)
    optimizer.step()
    found = running([optimizer], model, Partition.of(model))
    before = found.state[0]["state"][0]["exp_avg"].clone()  # type: ignore[union-attr]
    backward(model, 1)
    optimizer.step()
    assert torch.equal(found.state[0]["state"][0]["exp_avg"], before)  # type: ignore[union-attr]


def test_an_optimizer_that_has_not_stepped_yet_has_no_state():
    model = decoder()
    found = running(one_adamw(model), model, Partition.of(model))
    assert found is not None and found.solver == "adamw"
    assert [part["state"] for part in found.state] == [{}]


def unlike_groups(model: nn.Module) -> list[Any]:
    one, other = split(model)
    groups = [{"params": one, "betas": (0.9, 0.95)}, {"params": other, "betas": (0.8, 0.95)}]
    return [torch.optim.AdamW(groups, lr=RATE)]


NOT_OURS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "SGD": lambda m: [torch.optim.SGD(m.parameters(), lr=RATE)],
    "AMSGrad": lambda m: [torch.optim.AdamW(m.parameters(), lr=RATE, amsgrad=True)],
    "ascent": lambda m: [torch.optim.AdamW(m.parameters(), lr=RATE, maximize=True)],
    "groups with other means": unlike_groups,
    "a part of the parameters": lambda m: [torch.optim.AdamW(split(m)[0], lr=RATE)],
    "Muon on fewer matrices": lambda m: [
        torch.optim.Muon(split(m)[0][1:], lr=RATE),
        torch.optim.AdamW([split(m)[0][0], *split(m)[1]], lr=RATE),
    ],
    "something else": lambda m: [object()],
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_takes_other_steps_is_none_of_ours(name):
    model = decoder()
    found = running(NOT_OURS[name](model), model, Partition.of(model))
    assert found is not None and (found.solver, found.state) == ("", None)


def test_hessprobes_own_optimizer_is_known_and_none_is_none():
    model = decoder()
    partition = Partition.of(model)
    own = hp.optim.FirstOrderOptimizer(hp.Objective(model), partition, solver="muon", learning_rate=RATE)
    found = running([own], model, partition)
    assert found is not None and found.solver == "muon"
    assert running([], model, partition) is None
