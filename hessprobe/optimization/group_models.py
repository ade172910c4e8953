"""The models of the loss of several groups of blocks at one theta, each with the other groups still: layerwise and full.

A minibatch is worked on in pieces, of which every process has its share; values and gradients are added up over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessprobe.curvature import cost
from hessprobe.curvature.linearisation import Linearisation, NotLinearisable
from hessprobe.errors import UserError
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.optimization.local_model import (
    LocalGradient,
    Names,
    Tensors,
    added,
    damped,
    expansion,
    local_gradient,
)
from hessprobe.problem.measuring import measuring
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective


class LocalModels:
    """The models of the loss of several groups of parameters, each with all other groups at theta.

    Two engines. "forward-mode": a dual-number pass and a reverse pass for each group, 5/3 gradients for one group of
    everything. "shared": one linearisation for all groups, with the graph of w -> J^T w, from which each group takes
    its tangents and its gradient, from its first layer upward alone: (K + 6) / 3 gradients for K groups of equal work,
    where K dual passes take 5 (K + 1) / 6 and less memory. One that the model forbids is dropped for good, by each
    process for itself.

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
        self._checked = False
        self._usual_layers = False  # whether the model's layers must stay as they are for a linearisation

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
        return cost.linearised_gradients(k) if self.engine == "shared" else k * cost.dual_pass(k)

    def gradients(self, batch: Batch | MicroBatches, theta: Tensors, delta: Tensors) -> list[LocalGradient]:
        """Returns every group's model at its part of delta, on one minibatch, all linearised at theta.

        Args:
            theta: all partitioned parameters by name.
            delta: displacement by name; a group reads its own entries alone.

        Raises:
            UserError: an unknown model of the loss, a minibatch without a target, or a network that no engine can
                differentiate.
        """
        minibatch = self.objective.micro_batches(batch)
        pieces, weight = self.objective.own_pieces(minibatch), minibatch.weight
        # Nothing in it waits for another process: which engine is tried is each one's own business.
        own = self._by_an_engine(pieces, weight, theta, delta)
        whole = self._total(own) if self.objective.processes.count > 1 else own
        return [damped(one, delta, self.damping) for one in whole]

    def _by_an_engine(
        self, pieces: Sequence[Batch], weight: float, theta: Tensors, delta: Tensors
    ) -> list[LocalGradient]:
        """Returns the pieces' share of every group's model, by the first engine that the network takes."""
        refusals: list[Exception] = []
        for engine in self._engines:
            one = self._by_forward_mode if engine == "forward-mode" else self._by_linearisation
            try:
                if len(pieces) == 1:
                    found = one(pieces[0], weight, theta, delta)
                else:
                    found = [_nothing(theta, names) for names in self.groups]
                    for piece in pieces:
                        found = list(map(added, found, one(piece, weight, theta, delta)))
            except (RuntimeError, NotImplementedError, UserError) as refusal:
                refusals.append(refusal)
            else:
                self.engine = engine
                return found
        raise next((e for e in refusals if isinstance(e, UserError)), refusals[0])

    def _by_forward_mode(
        self, batch: Batch, weight: float, theta: Tensors, delta: Tensors
    ) -> list[LocalGradient]:
        return [
            local_gradient(self.objective, batch, theta, delta, names, model=self.model, weight=weight)
            for names in self.groups
        ]

    def _by_linearisation(
        self, batch: Batch, weight: float, theta: Tensors, delta: Tensors
    ) -> list[LocalGradient]:
        """Costs 1 gradient, and for each group 2/3 of the layers from its first one upward."""
        try:
            return self._linearised(batch, weight, theta, delta)
        except (RuntimeError, NotImplementedError) as refusal:
            if is_out_of_memory(refusal) or self._usual_layers:
                raise
            self._usual_layers = True
        try:
            return self._linearised(batch, weight, theta, delta)
        except NotLinearisable as refusal:
            raise UserError(
                f"{type(self.objective.model).__name__} has no second derivatives where Gauss-Newton needs them "
                f"({refusal}), and no forward mode: a custom function or kernel whose backward pass cannot be "
                "differentiated. Train with the plain implementation of that layer"
            ) from refusal

    def _linearised(self, batch: Batch, weight: float, theta: Tensors, delta: Tensors) -> list[LocalGradient]:
        objective, found = self.objective, []
        leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}
        with measuring(objective.model):
            z_and_j = Linearisation(objective, batch, leaves, usual_layers=self._usual_layers)
            if not self._checked:
                z_and_j.check(self.groups)
                self._checked = True
            targets = objective.targets(batch)
            model_at = expansion(objective.loss_function, z_and_j.outputs, targets, self.model)
            for names in self.groups:
                value, cotangent = model_at(z_and_j.tangent(delta, names))
                gradient = z_and_j.pull_back(cotangent / weight, names)
                found.append(LocalGradient(value=float(value) / weight, gradient=gradient))
        return found

    def _total(self, own: Sequence[LocalGradient]) -> list[LocalGradient]:
        """Returns the sums over processes, all of them in one collective."""
        tensors = [gradient for one in own for gradient in one.gradient.values()]
        values = torch.tensor([one.value for one in own], dtype=tensors[0].dtype, device=tensors[0].device)
        (flat,) = self.objective.processes.total(torch.cat([values, *(x.reshape(-1) for x in tensors)]))
        parts = iter(flat.split([len(own), *(x.numel() for x in tensors)]))
        sums = next(parts).tolist()
        return [
            LocalGradient(
                value=value, gradient={n: next(parts).view_as(x).to(x) for n, x in one.gradient.items()}
            )
            for value, one in zip(sums, own, strict=True)
        ]


def _nothing(theta: Tensors, names: Names) -> LocalGradient:
    """Returns an empty sum."""
    gradient: dict[str, Tensor] = {name: torch.zeros_like(theta[name]) for name in names}
    return LocalGradient(value=0.0, gradient=gradient)
