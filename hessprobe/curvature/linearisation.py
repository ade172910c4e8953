"""A network linearised on one batch: z and the graph of w -> J^T w are made once, and then serve any number of products.

J^T w is linear in w, so its own reverse pass along v gives J v ("double backward"), and a group of parameters takes its
part of either from the outputs down to its own first layer: no product walks through the network again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hessprobe.curvature.first_order import first_order
from hessprobe.machine.devices import read
from hessprobe.machine.seeds import trial_vectors
from hessprobe.problem.measuring import with_parameters
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules


class NotLinearisable(RuntimeError):
    """The model has no second derivatives in reverse mode; other ways may still be open."""


class Linearisation:
    """Outputs z (n, c) of a batch and their Jacobian J in the parameters, at theta. All methods run under `measuring`.

    Args:
        leaves: all partitioned parameters by name, wanting gradients; they are theta for good.
        counted: whether `bytes` says what the graph holds.
        usual_layers: whether gelu, silu and layer_norm stay torch's own. Without it they are taken to first order, which
            halves the cost of tangents; a model that runs them again in its reverse pass (activation checkpointing) then
            raises there, for it would not run what was recorded.

    Cost: 1 gradient, once; memory two to three times a gradient's, for as long as this lives.
    """

    _z: Tensor
    _w: Tensor
    _pulled: Mapping[str, Tensor | None]

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        leaves: dict[str, Tensor],
        *,
        counted: bool = False,
        usual_layers: bool = False,
    ) -> None:
        self.model, self._usual = objective.model, usual_layers
        self.leaves = leaves
        self._held: dict[int, int] = {}
        if counted:
            held = self._held  # not self, which the graph would then hold in a circle

            def note(t: Tensor) -> Tensor:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                # Not t: an output that its own graph holds is never freed. Unpacking puts the graph back on.
                return t.detach()

            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                self._record(objective, batch)
        else:
            self._record(objective, batch)

    def _record(self, objective: Objective, batch: Batch) -> None:
        def recorded() -> None:
            z = objective.outputs(batch, self.leaves)
            w = torch.zeros_like(z, requires_grad=True)
            pulled: Sequence[Tensor | None] = [None] * len(self.leaves)
            if z.requires_grad:
                inputs = list(self.leaves.values())
                pulled = torch.autograd.grad(z, inputs, w, create_graph=True, allow_unused=True)
            self._z, self._w, self._pulled = z, w, dict(zip(self.leaves, pulled, strict=True))

        with nullcontext() if self._usual else first_order():
            with_parameters(self.model, self.leaves, recorded)

    @property
    def bytes(self) -> int:
        """What the graph holds beside the parameters; 0 where it was not `counted`."""
        own = {leaf.untyped_storage().data_ptr() for leaf in self.leaves.values()}
        return sum(size for pointer, size in self._held.items() if pointer not in own)

    @property
    def outputs(self) -> Tensor:
        """Z (n, c), without a graph."""
        return self._z.detach()

    def tangent(self, v: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Returns J v (n, c) for v on the parameters `names` alone. Cost: 2/3 gradient for all, 1/3 and less for few."""
        with without_rules():
            live = [(g, v[n]) for n in names if (g := self._pulled[n]) is not None and g.requires_grad]
        if not live:
            return torch.zeros_like(self._w)
        firsts, along = zip(*live, strict=True)

        def pushed() -> Tensor | None:
            return torch.autograd.grad(firsts, self._w, along, retain_graph=True, allow_unused=True)[0]

        jv = with_parameters(self.model, self.leaves, pushed)
        return torch.zeros_like(self._w) if jv is None else jv.detach()

    def pull_back(self, cotangent: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns J^T cotangent by name, zero where the outputs do not depend on a parameter. Cost: as `tangent`."""
        inputs = [self.leaves[name] for name in names]
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if self._z.requires_grad:

            def pulled() -> Sequence[Tensor | None]:
                return torch.autograd.grad(self._z, inputs, cotangent, retain_graph=True, allow_unused=True)

            grads = with_parameters(self.model, self.leaves, pulled)
        return {
            n: torch.zeros_like(x) if g is None else g for n, x, g in zip(names, inputs, grads, strict=True)
        }

    def check(self, groups: Sequence[Sequence[str]]) -> None:
        """Raises where J (second derivatives) and J^T (first ones) are not of one matrix, group by group.

        A function whose backward pass cannot be differentiated (once_differentiable, a hand-written kernel) drops out
        of J without an error. Cost: a tangent for each group and a pull-back.
        """
        drawn = trial_vectors(self._z.device)
        w = drawn(self._z)
        v = {name: drawn(leaf) for name, leaf in self.leaves.items()}
        pulled = self.pull_back(w, list(self.leaves))
        gaps = []
        for names in groups:
            jv = self.tangent(v, names)
            there = (w * jv).sum()
            back = torch.stack([(pulled[n] * v[n]).sum() for n in names]).sum()
            norms = [torch.stack([x[n].norm() for n in names]).norm() for x in (pulled, v)]
            size = w.norm() * jv.norm() + norms[0] * norms[1]
            gaps.append((there - back).abs() / size.clamp_min(torch.finfo(w.dtype).tiny))
        for gap in read(gaps):
            if gap > torch.finfo(w.dtype).eps ** 0.4:
                raise NotLinearisable(f"J and J^T differ by {gap:.1e}")
