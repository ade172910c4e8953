"""H v, the Hessian of the mean loss per token applied to vectors.

Forward over reverse (Pearlmutter 1994): tangents through the gradient's own passes, 3 gradients by operation count,
2 each (and 1 once) for several vectors at one theta. Reverse over reverse where a model forbids forward mode, and for
many products at one theta, from graphs of the gradient made once (curvature/gradient_graph.py).
`torch.func.hessian` is not used: it is silently wrong for affine LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Self

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hessprobe.curvature.difference_steps import Named
from hessprobe.curvature.first_order_products import FIRST_ORDER
from hessprobe.curvature.forward_mode import NoForwardMode, check_forward_mode, moving
from hessprobe.curvature.gradient_graph import GradientGraph
from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.operator import Blocks
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.measuring import measuring
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch


class Hessian(ModelOperator):
    """The Hessian H of the mean loss per token, a p x p symmetric operator.

    Cost of `apply` on (k, p) rows, in gradients by operation count: 3 for k = 1, 2 k + 1 for more; through reverse over
    reverse 3 k. `engine="auto"` starts with "forward-over-reverse" and falls back to "reverse-over-reverse" where
    the model (activation checkpointing, a custom function without forward mode) refuses it.
    """

    ENGINES = ("forward-over-reverse", "reverse-over-reverse", FIRST_ORDER)
    FILLS_CPU = 256  # it keeps more than a Gauss-Newton product does
    _record = False
    _keep = 0  # bytes of gradient graphs that may live on between products
    _kept: Mapping[int, GradientGraph] = MappingProxyType({})  # by the piece's id
    _compared = False  # whether products from graphs have been found to be those without

    def _product(self, engine: str, k: int) -> Callable[..., Tensor]:
        return self._forward_over_reverse if engine == "forward-over-reverse" else self._reverse_over_reverse

    def _check_first_engine(self) -> None:
        """Raises where tangents through the gradient do not give a symmetric matrix; 2 products of a piece, once a model."""
        trust = self.objective.trust
        if trust.second is None and self.pieces:
            u, v = self._trial_rows(2)
            everything = self.partition.blocks
            with measuring(self.objective.model):
                hu, hv = (
                    self._forward_over_reverse(self.pieces[0], x[None], everything, everything)[0]
                    for x in (u, v)
                )
            one, other = (u * hv).double(), (v * hu).double()
            gap, size = (one.sum() - other.sum()).abs(), one.norm() + other.norm()
            trust.second = not bool(gap > torch.finfo(self.dtype).eps ** 0.4 * size)
        if trust.second is False:
            raise NoForwardMode(
                f"{type(self.objective.model).__name__}: second derivatives by forward mode are not symmetric on this model "
                "(a custom function or kernel): use the engine of two backward passes"
            )

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
        # No graph beyond those that vjp keeps for itself: nothing else wants gradients.
        if v.shape[0] == 1:
            return self._one_row(batch, v, columns, rows)
        theta = self.leaves(())
        check_forward_mode(self.objective, batch, theta)
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

        fixed = self.leaves(())
        check_forward_mode(self.objective, batch, fixed)
        with forward_ad.dual_level():
            self._gradient(batch, moving(fixed, tangents, moved), rows, keep)
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
        return pull_back(self._cotangent(z, batch), retain_graph=self._record, create_graph=self._record)[0]

    def _cotangent(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns (1/N) dloss/dz (n, c), differentiable in the outputs."""
        # In closed form: differentiating through log-softmax would dominate the cost.
        return self.objective.loss_function.gradient(outputs, self.objective.targets(batch)) / self.weight

    def _by_differences(self, batch: Batch, v: Named, e: float, wanted: Sequence[str]) -> Named:
        """Costs 2 gradients."""
        cotangent = self._difference_cotangent(batch)
        up, down = (self.first_order.passes.pulled_back(batch, cotangent, wanted, v, by) for by in (e, -e))
        return {name: up[name].sub_(down[name]).div_(2 * e) for name in up}

    def _difference_cotangent(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Returns what is pulled back at theta + e v and theta - e v, from the outputs there."""
        return partial(self._cotangent, batch=batch)

    def _reverse_over_reverse(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        moved, wanted = self.names_in(columns), self.names_in(rows)
        return self._through(self._graph(batch, moved), v, moved, wanted)

    def _graph(self, batch: Batch, names: Sequence[str]) -> GradientGraph:
        leaves, cotangent = self.leaves(self.partition.names), partial(self._cotangent, batch=batch)
        return GradientGraph(self.objective, batch, leaves, cotangent, names, counted=self._keep > 0)

    def _through(
        self, graph: GradientGraph, v: Tensor, moved: Sequence[str], wanted: Sequence[str]
    ) -> Tensor:
        product = torch.zeros_like(v)
        for row, into in zip(v, product, strict=True):
            shares = self.partition.unflatten(into)
            found = graph.product(self.partition.unflatten(row), moved, wanted)
            if found:
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [shares[name] for name in found], list(found.values())
                )
        return product

    def linearised(self, keep: int, *, compare: bool = True) -> Self:
        """Returns H at the present theta for many products: the graph of the gradient is kept between them.

        A product then takes 2 gradients for each row, and the first one 1 more. Where the graphs of all micro-batches
        hold more than `keep` bytes, or the model refuses them, products are as without it.

        Args:
            compare: one product from a graph is compared with one without it first, for up to 5 gradients: a function
                whose backward pass cannot be differentiated may drop out of a graph without an error.
        """
        found = self.fixed()
        found._keep, found._kept = keep, {}
        found._compared = not compare
        return found

    @property
    def from_graphs(self) -> bool:
        """Whether products have come from kept graphs, which were compared or trusted."""
        return bool(self._keep and self._kept)

    def _own(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        if self._keep and self.pieces and self.engine != FIRST_ORDER:
            try:
                if not self._compared and (with_targets := self.pieces.with_targets):
                    self._compare(with_targets[:1])
                return self._over_batches(self._by_kept_graph, v, columns, rows)
            except (RuntimeError, NotImplementedError, MemoryError):
                # No memory, or no second derivatives in reverse mode: forward mode may still have them.
                self._keep, self._kept = 0, {}
        return super()._own(v, columns, rows)

    def _compare(self, piece: MicroBatches) -> None:
        """Raises where a product from a graph is not the product without it, on one piece."""
        v, everything = self._trial_rows(1), self.partition.blocks
        with measuring(self.objective.model):
            kept = self._by_kept_graph(piece[0], v, everything, everything)
        theta = None if self._theta is None else self.partition.flatten(self._theta)
        other = type(self)(self.objective.alone, piece, self.partition, parameters=theta, memory=self.memory)
        gap = (kept - other.apply(v) * (other.weight / self.weight)).norm()
        if gap > torch.finfo(self.dtype).eps ** 0.4 * kept.norm():
            raise NotImplementedError("products from the gradient's own graph differ from those without it")
        self._compared = True

    def _by_kept_graph(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        """Returns a piece's share of products, from its graph: kept, or made now."""
        if id(batch) not in self._kept:
            self._kept = {**self._kept, id(batch): self._graph(batch, self.partition.names)}
            if sum(graph.bytes for graph in self._kept.values()) > self._keep:
                raise MemoryError("the graphs of all micro-batches hold more than they may")
        return self._through(self._kept[id(batch)], v, self.names_in(columns), self.names_in(rows))


def _handed_over(name: str, keep: Callable[[str, Tensor], None], gradient: Tensor) -> Tensor:
    """Keeps what is wanted of a parameter's gradient and lets go of it: all of them at once are two more vectors."""
    keep(name, gradient)
    return gradient.new_zeros(()).expand(gradient.shape)
