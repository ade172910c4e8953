"""Models of the loss around theta, written out with a dense Jacobian: what local_model.py has to equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.optimization.group_models import LocalModels
from hessprobe.optimization.local_model import LocalGradient
from hessprobe.problem.objective import Objective
from tests.cases import SEED, Case
from tests.models import IGNORED, ZOO, seeded
from tests.oracles import token_losses


@cache
def single(name: str) -> Case:
    """Returns a zoo case that holds its first micro-batch only: a local model is made of one minibatch."""
    problem = ZOO[name](seeded(SEED))
    return Case.on(problem._replace(batches=problem.batches[:1]))


def displacement(case: Case, seed: int = 3, scale: float = 0.3) -> Tensor:
    """Returns a delta (p,)."""
    return scale * case.rows(1, seed)[0]


def inside(case: Case, delta: Tensor, *blocks: str) -> Tensor:
    """Returns delta with everything outside the blocks set to zero."""
    kept = torch.zeros_like(delta)
    for block in blocks:
        kept[case.partition.slices[block]] = delta[case.partition.slices[block]]
    return kept


def places(case: Case, blocks: tuple[str, ...]) -> Tensor:
    """Returns the indices of the blocks' parameters in the flat vector."""
    slices = [case.partition.slices[block] for block in blocks]
    return torch.cat([torch.arange(s.start, s.stop) for s in slices])


def named(case: Case, vector: Tensor) -> Mapping[str, Tensor]:
    """Returns the tensors of a flat vector by parameter name."""
    return case.partition.unflatten(vector)


def vector(case: Case, local: LocalGradient) -> Tensor:
    """Returns a local gradient as a flat vector (p,), zero where it has no entry."""
    theta = named(case, case.partition.vector(case.problem.model))
    return case.partition.flatten({**{n: torch.zeros_like(x) for n, x in theta.items()}, **local.gradient})


def local_models(objective: Objective, groups: list[tuple[str, ...]], engine: str, **options) -> LocalModels:
    """Returns the models of groups of parameters by one engine, the only one they may take."""
    local = LocalModels(objective, groups, **options)
    local._engines = (engine,)
    return local


def linearised_loss(case: Case) -> Callable[[Tensor], Tensor]:
    """Returns delta -> mean loss(z + J delta) over all micro-batches' tokens, J dense from reverse mode."""
    model, partition = case.problem.model, case.partition
    theta = partition.vector(model)
    pieces = []
    for inputs, targets in case.problem.batches:

        def outputs(flat: Tensor, inputs: Tensor = inputs) -> Tensor:
            z = torch.func.functional_call(model, partition.unflatten(flat), (inputs,))
            return z.reshape(-1, z.shape[-1])

        with sdpa_kernel(SDPBackend.MATH):
            z, rows = outputs(theta).detach(), jacobian(outputs, theta)
        if targets.is_floating_point():
            valid, wanted = torch.ones(len(z), dtype=torch.bool), targets.reshape(z.shape)
        else:
            valid, wanted = targets.reshape(-1) != IGNORED, targets.reshape(-1)
        assert isinstance(rows, Tensor)
        pieces.append((z[valid], rows[valid], wanted[valid]))
    tokens = sum(len(z) for z, _, _ in pieces)

    def loss(delta: Tensor) -> Tensor:
        values = [token_losses(case.problem.loss, z + rows @ delta, y).sum() for z, rows, y in pieces]
        return torch.stack(values).sum() / tokens

    return loss


def damped_loss(case: Case, model: str, damping: float) -> Callable[[Tensor], Tensor]:
    """Returns delta -> the model of the loss, dense, plus damping |delta|^2 / 2."""
    truth, loss = case.truth, linearised_loss(case) if model == "prox-linear" else None

    def value(delta: Tensor) -> Tensor:
        if loss is not None:
            found = loss(delta)
        else:
            found = truth.loss + truth.gradient @ delta + 0.5 * delta @ truth.gauss_newton @ delta
        return found + 0.5 * damping * delta.square().sum()

    return value
