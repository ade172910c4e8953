"""H v, the Hessian of the mean loss per token applied to vectors.

Forward over reverse (Pearlmutter 1994): tangents through the gradient's own passes, 3 gradients by operation count,
2 each (and 1 once) for several vectors at one theta. Reverse over reverse where a model forbids forward mode.
`torch.func.hessian` is not used: it is silently wrong for affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.operator import Blocks
from hessprobe.problem.memory import is_out_of_memory
from hessprobe.problem.objective import Batch, with_parameters


class Hessian(ModelOperator):
    """The Hessian H of the mean loss per token, a p x p symmetric operator.

    Cost of `apply` on (k, p) rows, in gradients by operation count: 3 for k = 1, 2 k + 1 for more; through reverse over
    reverse 3 k. `engine="auto"` starts with "forward-over-reverse" and falls back to "reverse-over-reverse" where
    the model (activation checkpointing, a custom function without forward mode) refuses it.
    """

    ENGINES = ("forward-over-reverse", "reverse-over-reverse")
    FILLS_CPU = 256  # it keeps more than a Gauss-Newton product does
    _record = False

    def _product(self, engine: str, k: int) -> Callable[..., Tensor]:
        return self._forward_over_reverse if engine == "forward-over-reverse" else self._reverse_over_reverse

    def _forward_over_reverse(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        try:
            return self._pearlmutter(batch, v, columns, rows)
        except (RuntimeError, NotImplementedError) as refusal:
            # Some of torch's fused backward passes have no forward mode; a backward pass that is itself recorded is
            # made of plain operations, at more memory.
            if self._record or is_out_of_memory(refusal):
                raise
            self._record = True
            return self._pearlmutter(batch, v, columns, rows)

    def _pearlmutter(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        with torch.no_grad():  # no graph beyond those that vjp keeps for itself
            if v.shape[0] == 1:
                return self._one_row(batch, v, columns, rows)
            theta = {name: leaf.detach() for name, leaf in self.leaves(()).items()}
            moved, tangents = self.names_in(columns), self.partition.unflatten(v)

            def along(t: dict[str, Tensor]) -> dict[str, Tensor]:
                def gradient(moving: dict[str, Tensor]) -> dict[str, Tensor]:
                    return self._gradient(batch, {**theta, **moving}, rows)

                return torch.func.jvp(gradient, ({name: theta[name] for name in moved},), (t,))[1]

            product = torch.func.vmap(along)({name: tangents[name] for name in moved})
            return self.flatten_rows(product, v.shape[0])

    def _one_row(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        product = torch.zeros_like(v)
        into = self.partition.unflatten(product[0])
        moved, tangents = self.names_in(columns), self.partition.unflatten(v[0])

        def keep(name: str, gradient: Tensor) -> None:
            tangent = forward_ad.unpack_dual(gradient).tangent
            if tangent is not None:
                into[name].copy_(tangent)

        with forward_ad.dual_level():
            theta = {
                name: forward_ad.make_dual(leaf, tangents[name]) if name in moved else leaf
                for name, leaf in self.leaves(()).items()
            }
            self._gradient(batch, theta, rows, keep)
        return product

    def _gradient(
        self,
        batch: Batch,
        theta: dict[str, Tensor],
        rows: Blocks,
        keep: Callable[[str, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the gradient by name; with `keep`, each is handed over as soon as it is there and dropped."""

        def outputs(own: dict[str, Tensor]) -> Tensor:
            for name, parameter in own.items():
                if keep is not None:
                    parameter.register_hook(partial(_handed_over, name, keep))
            return self.objective.outputs(batch, {**theta, **own})

        z, pull_back, *_ = torch.func.vjp(outputs, {name: theta[name] for name in self.names_in(rows)})
        # The loss's gradient in closed form: differentiating through log-softmax would dominate the cost.
        cotangent = self.objective.loss_function.gradient(z, self.objective.targets(batch)) / self.tokens
        return pull_back(cotangent, retain_graph=self._record, create_graph=self._record)[0]

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


def _handed_over(name: str, keep: Callable[[str, Tensor], None], gradient: Tensor) -> Tensor:
    """Keeps what is wanted of a parameter's gradient and lets go of it: all of them at once are two more vectors."""
    keep(name, gradient)
    return gradient.new_zeros(()).expand(gradient.shape)
