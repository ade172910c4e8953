"""The models of the loss around theta that Gauss-Newton minimises, and their gradients, matrix-free.

Quadratic: q(delta) = L + g.delta + delta.G delta / 2, gradient J^T (l'(z) + l''(z) J delta) / N.
Prox-linear: mean loss(z + J delta), gradient J^T l'(z + J delta) / N (both: Abreu et al. 2025, section 3).
Damping adds mu |delta|^2 / 2 to either, and mu delta to its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import dual_pass, linearised
from hessprobe.errors import unknown_name
from hessprobe.problem.losses import Loss
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Batch, Objective

MODELS = ("quadratic", "prox-linear")
Names = tuple[str, ...]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalGradient:
    """The value of a model of the loss at delta (nats per token) and its gradient by parameter name; or a share of both."""

    value: float
    gradient: dict[str, Tensor]


def expansion(
    loss: Loss, outputs: Tensor, targets: Tensor, model: str
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Returns the function J delta (n, c) -> the model's value and its derivative in J delta, summed over tokens."""
    if model not in MODELS:
        raise unknown_name("model of the loss", model, MODELS)
    if model == "prox-linear":
        return lambda jd: (loss.value(outputs + jd, targets), loss.gradient(outputs + jd, targets))
    value, slope = loss.value(outputs, targets), loss.gradient(outputs, targets)

    def quadratic(jd: Tensor) -> tuple[Tensor, Tensor]:
        curved = loss.hessian_product(outputs, targets, jd)
        return value + (slope * jd).sum() + 0.5 * (curved * jd).sum(), slope + curved

    return quadratic


def local_gradient(
    objective: Objective,
    batch: Batch,
    theta: Tensors,
    delta: Tensors,
    names: Names,
    *,
    model: str,
    weight: float,
) -> LocalGradient:
    """Returns a batch's share of one group's model and its gradient, by one dual-number and one reverse pass.

    Args:
        theta, delta: see LocalModels.gradients.
        names: the group's parameters. No tangent is computed below them and no gradient outside.
        weight: that of the minibatch that the batch is a piece of (Objective.weight).

    Cost: 5/3 gradients for all parameters, and for fewer 1/3 and 4/3 of the layers from their first one upward.
    """
    targets = objective.targets(batch)
    with measuring(objective.model):
        z, jd, pull_back = dual_pass(objective, batch, theta, delta, names, names)
        value, cotangent = expansion(objective.loss_function, z, targets, model)(jd)
        return LocalGradient(value=float(value) / weight, gradient=pull_back(cotangent / weight))


def predicted_decrease(
    objective: Objective, batches: Batch | Sequence[Batch], theta: Tensors, delta: Tensors, *, model: str
) -> float:
    """Returns model(0) - model(delta), undamped, in nats per token over the batches. Cost: 1 gradient (a dual pass)."""
    total, listed = 0.0, objective.micro_batches(batches)
    with measuring(objective.model):
        for piece in objective.own_pieces(listed):
            z, (jd,) = linearised(objective, piece, theta, delta, [tuple(theta)])
            targets = objective.targets(piece)
            start = objective.loss_function.value(z, targets)
            total += float(start - expansion(objective.loss_function, z, targets, model)(jd)[0])
    (whole,) = objective.processes.total(torch.tensor(total, dtype=torch.float64))
    return float(whole) / listed.weight


def added(one: LocalGradient, other: LocalGradient) -> LocalGradient:
    """Returns the sum of two shares; the first's gradient is overwritten."""
    gradient = {name: g.add_(other.gradient[name]) for name, g in one.gradient.items()}
    return LocalGradient(value=one.value + other.value, gradient=gradient)


def damped(one: LocalGradient, delta: Tensors, damping: float) -> LocalGradient:
    """Adds mu |delta|^2 / 2 and mu delta, of the gradient's own entries."""
    if not damping:
        return one
    squares = torch.stack([delta[name].square().sum() for name in one.gradient])
    gradient = {name: g + damping * delta[name] for name, g in one.gradient.items()}
    return LocalGradient(value=one.value + 0.5 * damping * float(squares.sum()), gradient=gradient)
