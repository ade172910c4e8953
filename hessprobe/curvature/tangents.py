"""J v, the change of a network's outputs along parameters, without a graph: by dual numbers, or by two reverse passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hessprobe.curvature.forward_mode import check_forward_mode, forward_tangents
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.measuring import with_parameters
from hessprobe.problem.objective import Batch, Objective


def dual_outputs(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    moved: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Returns outputs z (n, c) and J v (n, c) for v on the parameters `moved`, without any graph.

    Raises:
        NoForwardMode: the model's forward mode is not to be believed.
    """
    check_forward_mode(objective, batch, theta)
    return forward_tangents(objective, batch, theta, tangents, tuple(moved))


def linearised(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    *,
    reverse: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Returns z (n, c) and, for each group of parameters, J v (n, c) for v on it alone, without a graph.

    By forward mode, or where the model has none through double backward (unless `reverse` forbids it, and its error is
    raised). Cost: 2/3 of a gradient a group (a third more for z), at most.
    """
    try:
        passes = [dual_outputs(objective, batch, theta, tangents, names) for names in groups]
        return passes[0][0], [jv for _, jv in passes]
    except (RuntimeError, NotImplementedError) as refusal:  # the model has no forward mode
        if is_out_of_memory(refusal) or not reverse:
            raise
        leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}

        def by_reverse() -> tuple[Tensor, list[Tensor]]:
            z = objective.outputs(batch, leaves)
            return z.detach(), [jv.detach() for jv in reverse_tangents(z, leaves, tangents, groups)]

        return with_parameters(objective.model, leaves, by_reverse)


def reverse_tangents(
    outputs: Tensor,
    leaves: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
) -> list[Tensor]:
    """Returns J v (n, c) for v on each group of parameters, without forward mode.

    J^T w is linear in w, so its own reverse pass along v gives J v ("double backward").
    """
    w = torch.zeros_like(outputs, requires_grad=True)
    names = [name for group in groups for name in group]
    pulled = torch.autograd.grad(outputs, [leaves[n] for n in names], w, create_graph=True, allow_unused=True)
    by_name = dict(zip(names, pulled, strict=True))
    found = []
    for group in groups:
        live = [(g, tangents[n]) for n in group if (g := by_name[n]) is not None]
        if live:
            firsts, along = zip(*live, strict=True)
            found.append(torch.autograd.grad(firsts, w, along, retain_graph=True)[0])
        else:
            found.append(torch.zeros_like(outputs))
    return found
