"""The models of the loss of several groups of blocks at one theta, each with the other groups still: layerwise and full.

J^T w is linear in w, so its own reverse pass along v gives J v ("double backward"). That graph and the forward pass are
made once for all groups, and a group's part of them reaches from the outputs down to its own first layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.optimization.local_model import (
    LocalGradient,
    Names,
    Tensors,
    damped,
    expansion,
    local_gradient,
)
from hessprobe.problem.objective import Batch, Objective, measuring, with_parameters


class LocalModels:
    """The models of the loss of several groups of parameters, each with all other groups at theta.

    Two engines. "forward-mode": a dual-number pass and a reverse pass for each group, 5/3 gradients for one group of
    everything. "shared": one linearisation for all groups, with the graph of w -> J^T w, from which each group takes
    its tangents and its gradient, from its first layer upward alone: (K + 6) / 3 gradients for K groups of equal work,
    where K dual passes take 5 (K + 1) / 6 and less memory. One that the model forbids is dropped for good.

    Args:
        objective: model and loss.
        groups: parameters' names, a tuple for each sub-problem.
        model: one of MODELS.
        damping: mu.
    """

    def __init__(
        self, objective: Objective, groups: Sequence[Names], *, model: str = "quadratic", damping: float = 0.0
    ) -> None:
        self.objective = objective
        self.groups = tuple(groups)
        self.model = model
        self.damping = damping
        self._best_first = ("forward-mode", "shared") if len(self.groups) == 1 else ("shared", "forward-mode")
        self._engines = self._best_first
        self._trusted = False

    @property
    def engine(self) -> str:
        """The way gradients are computed now."""
        return self._engines[0]

    @engine.setter
    def engine(self, name: str) -> None:
        self._engines = self._best_first[self._best_first.index(name) :]

    @property
    def cost(self) -> float:
        """Gradients that `gradients` costs, by operation count, for groups of equal work."""
        k = len(self.groups)
        return (k + 6) / 3 if self.engine == "shared" else k * product_cost(k)

    def gradients(self, batch: Batch, theta: Tensors, delta: Tensors) -> list[LocalGradient]:
        """Returns every group's model at its part of delta, on one minibatch, all linearised at theta.

        Args:
            theta: all partitioned parameters by name.
            delta: displacement by name; a group reads its own entries alone.

        Raises:
            UserError: an unknown model of the loss, or a network that no engine can differentiate.
        """
        refusals: list[Exception] = []
        for engine in self._engines:
            try:
                found = self._by(engine, batch, theta, delta)
            except (RuntimeError, NotImplementedError, UserError) as refusal:
                refusals.append(refusal)
            else:
                self.engine = engine
                return found
        raise next((e for e in refusals if isinstance(e, UserError)), refusals[0])

    def _by(self, engine: str, batch: Batch, theta: Tensors, delta: Tensors) -> list[LocalGradient]:
        options = {"model": self.model, "damping": self.damping}
        if engine == "forward-mode":
            return [local_gradient(self.objective, batch, theta, delta, g, **options) for g in self.groups]
        found = shared_gradients(
            self.objective, batch, theta, delta, self.groups, check=not self._trusted, **options
        )
        # A displacement of zero has a tangent of zero, whatever the derivatives are worth.
        self._trusted = self._trusted or all(any(bool(delta[n].any()) for n in g) for g in self.groups)
        return found


def product_cost(groups: int) -> float:
    """Returns the gradients that one group's dual and reverse pass costs: the mean over groups of equal work.

    Torch multiplies by the zero tangents of a later layer's matrices too: 1 forward, not 1/2, for a group in the middle.
    """
    return 5 / 6 * (1 + 1 / groups)


def shared_gradients(
    objective: Objective,
    batch: Batch,
    theta: Tensors,
    delta: Tensors,
    groups: Sequence[Names],
    *,
    model: str,
    damping: float = 0.0,
    check: bool = True,
) -> list[LocalGradient]:
    """Returns what `local_gradient` returns for each group, from one forward pass for all.

    Args:
        check: compare <c, J delta> with <J^T c, delta> for every group: a function whose backward pass cannot be
            differentiated drops out of the first without an error.

    Cost: 1 gradient, and for each group 2/3 of the layers from its first one upward.

    Raises:
        UserError: what `check` finds.
    """
    loss, targets, tokens = objective.loss_function, objective.targets(batch), objective.tokens(batch)
    leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}

    def all_groups() -> list[LocalGradient]:
        z = objective.outputs(batch, leaves)
        model_at = expansion(loss, z.detach(), targets, model)
        w = torch.zeros_like(z, requires_grad=True)
        pulled: dict[str, Tensor | None] = dict.fromkeys(leaves)
        if z.requires_grad:
            own = [name for names in groups for name in names]
            grads = torch.autograd.grad(z, [leaves[n] for n in own], w, create_graph=True, allow_unused=True)
            pulled.update(zip(own, grads, strict=True))
            del grads
        found = []
        for names in groups:
            live = [(g, delta[n]) for n in names if (g := pulled.pop(n)) is not None and g.requires_grad]
            jd = None
            if live:
                firsts, along = zip(*live, strict=True)
                (jd,) = torch.autograd.grad(firsts, w, along, retain_graph=True, allow_unused=True)
            jd = torch.zeros_like(w) if jd is None else jd.detach()
            value, cotangent = model_at(jd)
            cotangent = cotangent / tokens
            gradient = _pulled_back(z, {n: leaves[n] for n in names}, cotangent)
            if check:
                _check_adjoint(objective, cotangent, jd, gradient, delta)
            found.append(damped(float(value) / tokens, gradient, delta, damping))
        return found

    with measuring(objective.model):
        return with_parameters(objective.model, leaves, all_groups)


def _pulled_back(z: Tensor, leaves: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Returns J^T cotangent by name, keeping the graph; zeros where the outputs do not depend on a leaf."""
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if z.requires_grad:
        inputs = list(leaves.values())
        grads = torch.autograd.grad(z, inputs, cotangent, retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)
    }


def _check_adjoint(
    objective: Objective, cotangent: Tensor, jd: Tensor, gradient: Tensors, delta: Tensors
) -> None:
    """Raises where J delta (second derivatives) and J^T c (first ones) are not of one J."""
    forward, size = (cotangent * jd).sum(), cotangent.norm() * jd.norm()
    back = torch.stack([(g * delta[n]).sum() for n, g in gradient.items()]).sum()
    norms = [torch.stack([x[n].norm() for n in gradient]).norm() for x in (gradient, delta)]
    gap = (forward - back).abs() / (size + norms[0] * norms[1]).clamp_min(torch.finfo(jd.dtype).tiny)
    if gap > torch.finfo(jd.dtype).eps ** 0.4:
        raise UserError(
            f"{type(objective.model).__name__} has no second derivatives where Gauss-Newton needs them (J and J^T differ "
            f"by {float(gap):.1e}), and no forward mode: a custom function or kernel whose backward pass cannot be "
            "differentiated. Train with the plain implementation of that layer"
        )
