"""H v, the Hessian of the mean loss per token applied to vectors.

Forward over reverse (Pearlmutter 1994): tangents through the gradient's own passes, 3 gradients by operation count,
2 each (and 1 once) for several vectors at one theta. Reverse over reverse where a model forbids forward mode.
`torch.func.hessian` is not used: it is silently wrong for affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.operator import Blocks
from hessprobe.problem.objective import Batch, with_parameters


class Hessian(ModelOperator):
    """The Hessian H of the mean loss per token, a p x p symmetric operator.

    Cost of `apply` on (k, p) rows, in gradients by operation count: 3 for k = 1, 2 k + 1 for more; through reverse over
    reverse 3 k. `engine="auto"` starts with "forward-over-reverse" and falls back to "reverse-over-reverse" where
    the model (activation checkpointing, a custom function without forward mode) refuses it.
    """

    ENGINES = ("forward-over-reverse", "reverse-over-reverse")
    _record = False

    def _product(self, engine: str, k: int) -> Callable[..., Tensor]:
        return self._forward_over_reverse if engine == "forward-over-reverse" else self._reverse_over_reverse

    def _forward_over_reverse(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        try:
            return self._pearlmutter(batch, v, columns, rows)
        except (RuntimeError, NotImplementedError):
            # Torch's fused backward passes (silu's) have no forward mode; a backward pass that is itself recorded
            # is made of plain operations, at more memory.
            if self._record:
                raise
            self._record = True
            return self._pearlmutter(batch, v, columns, rows)

    def _pearlmutter(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        wanted, moved = self.names_in(rows), self.names_in(columns)
        theta = {name: leaf.detach() for name, leaf in self.leaves().items()}
        record = self._record
        targets = self.objective.targets(batch)
        tangents = self.partition.unflatten(v)

        def gradient(moving: dict[str, Tensor]) -> dict[str, Tensor]:
            point = {**theta, **moving}

            def outputs(own: dict[str, Tensor]) -> Tensor:
                return self.objective.outputs(batch, {**point, **own})

            z, pull_back, *_ = torch.func.vjp(outputs, {name: point[name] for name in wanted})
            # The loss's gradient in closed form: differentiating through log-softmax would dominate the cost.
            cotangent = self.objective.loss_function.gradient(z, targets) / self.tokens
            return pull_back(cotangent, retain_graph=record, create_graph=record)[0]

        def along(t: dict[str, Tensor]) -> dict[str, Tensor]:
            return torch.func.jvp(gradient, ({name: theta[name] for name in moved},), (t,))[1]

        with torch.no_grad():  # no graph beyond those that vjp keeps for itself
            if v.shape[0] == 1:
                product = along({name: tangents[name][0] for name in moved})
            else:
                product = torch.func.vmap(along)({name: tangents[name] for name in moved})
        return self.flatten_rows(product, v.shape[0])

    def _reverse_over_reverse(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        leaves = self.leaves(self.partition.names)
        return with_parameters(
            self.objective.model, leaves, lambda: self._double_backward(batch, v, columns, rows, leaves)
        )

    def _double_backward(
        self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks, leaves: dict[str, Tensor]
    ) -> Tensor:
        wanted, moved = self.names_in(rows), self.names_in(columns)
        targets = self.objective.targets(batch)
        z = self.objective.outputs(batch, leaves)
        cotangent = self.objective.loss_function.gradient(z, targets) / self.tokens
        # H is symmetric: the gradient of (gradient_columns . v_columns) gives the wanted rows.
        firsts = torch.autograd.grad(
            z, [leaves[n] for n in moved], cotangent, create_graph=True, allow_unused=True
        )
        seconds = []
        for row in v:
            tangents = self.partition.unflatten(row)
            pairs = [(g, tangents[n]) for n, g in zip(moved, firsts, strict=True) if g is not None]
            live = [(g, t) for g, t in pairs if g.requires_grad]
            if not live:  # linear in every moved parameter
                seconds.append({name: torch.zeros_like(leaves[name]) for name in wanted})
                continue
            found = torch.autograd.grad(
                [g for g, _ in live],
                [leaves[n] for n in wanted],
                [t for _, t in live],
                retain_graph=True,
                allow_unused=True,
            )
            seconds.append(
                {
                    n: torch.zeros_like(leaves[n]) if s is None else s
                    for n, s in zip(wanted, found, strict=True)
                }
            )
        return self.flatten_rows({n: torch.stack([s[n] for s in seconds]) for n in wanted}, v.shape[0])
