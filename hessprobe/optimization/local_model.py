"""The models of the loss around theta that Gauss-Newton minimises, and their gradients, matrix-free.

Quadratic: q_G(delta) = L + g.delta + delta.G delta / 2, gradient J^T (l'(z) + l''(z) J delta) / N.
Prox-linear: mean loss(z + J delta), gradient J^T l'(z + J delta) / N (both: Abreu et al. 2025, section 3).
One dual-number pass and one reverse pass each, 5/3 gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import dual_outputs, dual_pass
from hessprobe.errors import unknown_name
from hessprobe.problem.objective import Batch, Objective, measuring

MODELS = ("quadratic", "prox-linear")


@dataclass(frozen=True, kw_only=True)
class LocalGradient:
    """The value of a model of the loss at delta (nats per token) and its gradient by parameter name."""

    value: float
    gradient: dict[str, Tensor]


def local_value(objective: Objective, batch: Batch, outputs: Tensor, tangents: Tensor, model: str) -> Tensor:
    """Returns the model's value summed over the batch's tokens, from z (n, c) and J delta (n, c)."""
    loss, targets = objective.loss_function, objective.targets(batch)
    if model == "prox-linear":
        return loss.value(outputs + tangents, targets)
    slope = (loss.gradient(outputs, targets) * tangents).sum()
    curvature = (loss.hessian_product(outputs, targets, tangents) * tangents).sum()
    return loss.value(outputs, targets) + slope + 0.5 * curvature


def local_gradient(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    names: tuple[str, ...],
    *,
    model: str,
) -> LocalGradient:
    """Returns the model's value and gradient on one minibatch, everything linearised at theta.

    Args:
        theta: all partitioned parameters by name.
        delta: displacement by name; only the entries of `names` move.
        names: the parameters of the sub-problem: all for full Gauss-Newton, one block's for layerwise. No tangent
            is computed below them and no gradient outside.
        model: "quadratic" or "prox-linear".

    Cost: 5/3 gradients for all parameters, less for later blocks.

    Raises:
        UserError: an unknown model.
    """
    if model not in MODELS:
        raise unknown_name("model of the loss", model, MODELS)
    loss, targets, tokens = objective.loss_function, objective.targets(batch), objective.tokens(batch)
    with measuring(objective.model):
        z, jd, pull_back = dual_pass(objective, batch, theta, delta, names, names)
        if model == "prox-linear":
            cotangent = loss.gradient(z + jd, targets)
        else:
            cotangent = loss.gradient(z, targets) + loss.hessian_product(z, targets, jd)
        value = float(local_value(objective, batch, z, jd, model)) / tokens
        return LocalGradient(value=value, gradient=pull_back(cotangent / tokens))


def predicted_decrease(
    objective: Objective,
    batches: list[Batch],
    theta: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    *,
    model: str,
) -> float:
    """Returns model(0) - model(delta) in nats per token over the batches. Cost: one dual forward pass, 1 gradient."""
    total = 0.0
    with measuring(objective.model), torch.no_grad():
        for batch in batches:
            z, jd = dual_outputs(objective, batch, theta, delta, tuple(theta))
            start = objective.loss_function.value(z, objective.targets(batch))
            total += float(start - local_value(objective, batch, z, jd, model))
    return total / objective.tokens(batches)
