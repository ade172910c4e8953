"""The step an optimizer would take at a place: the solver's own code, run on zeros in theta's place at learning rate 1.

Without weight decay no step depends on theta itself, so what the zeros become is the direction, with nothing rounded off.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn

from hessprobe.curvature.kronecker_factors import KINDS
from hessprobe.optimization.inner_solver import REFRESH, SOLVERS, FirstOrder, hidden_matrices
from hessprobe.optimization.kfac import KFAC
from hessprobe.optimization.place import Direction, Place
from hessprobe.optimization.running import RunningOptimizer

# Candidate -> the solver that takes its step.
OPTIMIZERS = {"adam" if name == "adamw" else name: name for name in SOLVERS}
PIECES = 4  # of the batch, whose gradients build a state: a step of Muon's takes as long as a gradient


def has_run(running: RunningOptimizer | None, candidate: str) -> TypeGuard[RunningOptimizer]:
    """Tells whether what runs is this candidate and has a state to answer from: that of one step at least."""
    if running is None or running.solver != OPTIMIZERS.get(candidate, candidate):
        return False
    if running.solver in KINDS:
        return running.state["factors"] is not None
    return any(bool(saved["state"]) for saved in running.state)


def running_step(running: RunningOptimizer, place: Place, generator: torch.Generator) -> Direction:
    """Returns the step from a copy of what runs; curvature that is due is estimated from the place's batches.

    Cost: Sophia's diagonal, 2 gradients, or K-FAC's factors in the steps in which they are due; else none.
    """
    if running.solver in KINDS:
        return _running_kfac(running, place, generator)
    moved = _zeros(place)
    refresh = running.refresh if running.solver in REFRESH else None
    solver = FirstOrder(running.solver, moved, hidden_matrices(place.objective.model), refresh=refresh)
    solver.load_state_dict(copy.deepcopy(running.state))  # it would go on in the very tensors it is given
    diagonal, cost = None, 0.0
    if running.solver == "sophia" and running.state[0]["param_groups"][0]["step"] % running.refresh == 0:
        diagonal, cost = place.diagonal(generator), place.diagonal_cost
    for optimizer in solver.optimizers:
        _without_decay(optimizer)
    return Direction(vector=_step(solver, place, moved, diagonal), gradients=cost)


def built_step(candidate: str, place: Place, generator: torch.Generator) -> Direction:
    """Returns the step of a fresh optimizer whose averages the place's batches have filled.

    Adam, Muon, Shampoo, SOAP: it first takes steps with the gradients of 4 pieces of the batches in turn (where there
    are fewer sequences, of those again and again), all at the one theta. Sophia, whose averages start at zero and are never
    freed of it: its momentum is g and its curvature an estimate of diag(G), as after many steps here.

    Cost: 1 gradient; Sophia's diagonal, 2.
    """
    moved = _zeros(place)
    # Shampoo's roots cost more than all else here: those of every second step, the last one's among them.
    refresh = 2 if candidate == "shampoo" else None
    hidden = hidden_matrices(place.objective.model)
    solver = FirstOrder(OPTIMIZERS[candidate], moved, hidden, refresh=refresh)
    if candidate == "sophia":
        first, second = solver.optimizers[0].param_groups[0]["betas"]
        diagonal = place.partition.unflatten(place.diagonal(generator) / (1 - second))
        gradient = place.partition.unflatten(place.gradient / (1 - first))
        solver.step(gradient, 1.0, None, diagonal=diagonal)
        return Direction(vector=_step(solver, place, moved), gradients=place.diagonal_cost)
    pieces = place.pieces(PIECES)
    gradients = [
        place.objective.gradient(piece, place.partition, parameters=place.named)[1] for piece in pieces
    ]
    for _ in range(-(-PIECES // len(pieces))):
        for gradient in gradients:
            solver.step(place.partition.unflatten(gradient), 1.0, None)
    return Direction(vector=_step(solver, place, moved), gradients=1.0)


def _running_kfac(running: RunningOptimizer, place: Place, generator: torch.Generator) -> Direction:
    state, cost = copy.deepcopy(running.state), 0.0
    if state["steps"] % running.refresh == 0:
        factors, cost = place.factors(running.solver, generator)
        state["factors"] = factors.state_dict()
    solver = KFAC(
        place.objective, place.partition, kind=running.solver, damping=running.damping, trust=running.trust
    )
    moved = {name: nn.Parameter(torch.zeros_like(x), False) for name, x in place.named.items()}
    solver.parameters = moved
    solver.load_state_dict(state)
    if solver.rest is not None:
        _without_decay(solver.rest)
    return Direction(vector=_step(solver, place, moved), gradients=cost)


def _step(
    solver: FirstOrder | KFAC, place: Place, moved: Mapping[str, Tensor], diagonal: Tensor | None = None
) -> Tensor:
    """Returns where the next step with the place's gradient leads from zero (p,)."""
    for x in moved.values():
        x.zero_()
    gradients = {name: x.clone() for name, x in place.partition.unflatten(place.gradient).items()}
    if isinstance(solver, KFAC):
        solver.step(gradients, 1.0, None)
    else:
        given = None if diagonal is None else place.partition.unflatten(diagonal)
        solver.step(gradients, 1.0, None, diagonal=given)
    return place.partition.flatten(moved)


def _zeros(place: Place) -> dict[str, Tensor]:
    """Returns zeros by parameter name, in the model's order: that in which optimizers number their states."""
    named = place.named
    return {
        name: torch.zeros_like(named[name])
        for name, _ in place.objective.model.named_parameters()
        if name in named
    }


def _without_decay(optimizer: torch.optim.Optimizer) -> None:
    """Takes weight decay out of a state just loaded, which carries what it ran with."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
