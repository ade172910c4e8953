"""The gradient on one batch with a graph of its own: made once, it serves any number of products with second derivatives.

d(gradient . v)/d theta = H v (reverse over reverse). No product walks through the network again, and torch's engine
takes each in one go, which on a small model is worth more than the operations that forward mode saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hessprobe.problem.measuring import with_parameters
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules


class GradientGraph:
    """J^T c by parameter name at theta, differentiable once more. All methods run under `measuring`.

    Args:
        leaves: all partitioned parameters by name, wanting gradients; they are theta for good.
        cotangent: c (n, c) from the outputs; what of them it leaves attached is differentiated too.
        names: the parameters that products may move.
        counted: whether `bytes` says what the graph holds beside the parameters; 0 where not.

    Cost: 1 gradient, once; memory two to three times a gradient's, for as long as this lives.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        leaves: dict[str, Tensor],
        cotangent: Callable[[Tensor], Tensor],
        names: Sequence[str],
        *,
        counted: bool = False,
    ) -> None:
        self.model, self.leaves = objective.model, leaves
        held: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()  # t itself may be an output of the node that keeps it: a circle, never freed

        def recorded() -> Sequence[Tensor | None]:
            z = objective.outputs(batch, leaves)
            inputs = [leaves[name] for name in names]
            if not z.requires_grad:
                return [None] * len(inputs)
            return torch.autograd.grad(z, inputs, cotangent(z), create_graph=True, allow_unused=True)

        # Hooks have a price of their own with checkpointed activations, which are packed by hooks too.
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t) if counted else nullcontext()
        with hooks:
            firsts = with_parameters(self.model, leaves, recorded)
        self._firsts = dict(zip(names, firsts, strict=True))
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        self.bytes = sum(size for pointer, size in held.items() if pointer not in own)

    def product(
        self, v: Mapping[str, Tensor], moved: Sequence[str], wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        """Returns the rows `wanted` of the product with v on `moved`, by name; what is missing is zero.

        Cost: 2 gradients, less where columns and rows lie near the outputs.
        """
        with without_rules():
            pairs = [(g, v[n]) for n in moved if (g := self._firsts[n]) is not None and g.requires_grad]
        if not pairs:  # linear in every moved parameter
            return {}
        firsts, along = zip(*pairs, strict=True)
        inputs = [self.leaves[name] for name in wanted]

        def differentiated() -> Sequence[Tensor | None]:
            return torch.autograd.grad(firsts, inputs, along, retain_graph=True, allow_unused=True)

        found = with_parameters(self.model, self.leaves, differentiated)
        return {n: x for n, x in zip(wanted, found, strict=True) if x is not None}
