"""Whether tangents go where gradients come from: <w, J v> by forward mode against <J^T w, v> by a backward pass.

What stops autograd in a model's own way (a hook on a gradient, a custom function with two ideas of its derivative) may let
forward mode through, and products are then of no one matrix, without an error. Known kinds of it are mended where torch's
operations are (problem/operation_rules.py); what is left is found here, once for each model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hessprobe.machine.devices import read
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.machine.seeds import trial_vectors
from hessprobe.problem.measuring import with_parameters
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules

SMALLEST = 1e-3  # gradients below this part of the largest are not told from rounding


class NoForwardMode(NotImplementedError):
    """Forward mode gives another Jacobian than the backward pass."""


def check_forward_mode(objective: Objective, batch: Batch, theta: Mapping[str, Tensor]) -> None:
    """Raises where forward mode is not the transpose of the backward pass; remembers what it found of the model.

    The direction moves each parameter tensor so far that all of them count alike. Cost: 2 gradients, once a model.

    Raises:
        NoForwardMode: they differ.
    """
    if objective.trust.forward_mode is None:
        try:
            objective.trust.forward_mode = _agrees(objective, batch, theta)
        except (RuntimeError, NotImplementedError) as refusal:
            if is_out_of_memory(refusal):
                raise
            objective.trust.forward_mode = False
            raise
    if not objective.trust.forward_mode:
        raise NoForwardMode(
            f"{type(objective.model).__name__}: forward mode and backward passes differ on this model (a hook on a "
            "gradient, or a custom function): use an engine of backward passes"
        )


def _agrees(objective: Objective, batch: Batch, theta: Mapping[str, Tensor]) -> bool:
    drawn = trial_vectors(next(iter(theta.values())).device)
    leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}

    def pulled_back() -> tuple[Tensor, list[Tensor | None]]:
        z = objective.outputs(batch, leaves)
        w = drawn(z.detach())
        if not z.requires_grad:
            return w, [None] * len(leaves)
        return w, list(torch.autograd.grad(z, list(leaves.values()), w, allow_unused=True))

    w, pulled = with_parameters(objective.model, leaves, pulled_back)
    known = iter(read(g.norm() for g in pulled if g is not None))
    norms = [0.0 if g is None else next(known) for g in pulled]
    least = SMALLEST * max(norms) or 1.0
    tangents = {
        name: drawn(x).div_(max(norm, least)) for (name, x), norm in zip(theta.items(), norms, strict=True)
    }
    terms = [(g * t).double() for g, t in zip(pulled, tangents.values(), strict=True) if g is not None]
    _, jv = forward_tangents(objective, batch, theta, tangents, tuple(theta))
    along = (w * jv).double()
    gap = along.sum() - sum(term.sum() for term in terms)
    size = along.norm() + sum(read(term.square().sum() for term in terms)) ** 0.5
    return not bool(abs(gap) > torch.finfo(jv.dtype).eps ** 0.4 * size)


def forward_tangents(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    moved: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """Returns outputs z (n, c) and J v (n, c) for v on the parameters `moved`, by dual numbers, without any graph."""
    fixed = detached(theta)
    # Not under no_grad: that is how a model says where tangents are to stop. Nothing here wants gradients.
    with forward_ad.dual_level():
        duals = moving(fixed, tangents, moved)
        z, jv = forward_ad.unpack_dual(objective.outputs(batch, duals))
        z = z.detach()
        return z, torch.zeros_like(z) if jv is None else jv.detach()


def detached(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns parameters by name that want no gradients."""
    with without_rules():
        return {name: x.detach() for name, x in theta.items()}


def moving(
    fixed: Mapping[str, Tensor], tangents: Mapping[str, Tensor], moved: Collection[str]
) -> dict[str, Tensor]:
    """Returns parameters by name, those `moved` as dual numbers; inside a dual level."""
    with without_rules():
        return {n: forward_ad.make_dual(x, tangents[n]) if n in moved else x for n, x in fixed.items()}
