"""G v = (1/N) J^T (d2 loss / dz2) J v without forming J (Schraudolph 2002; Martens 2010).

One vector: a single forward pass of dual numbers that keeps the reverse graph, 5/3 gradients by operation count.
Several: tangents batched over one linearisation, then batched pull-backs, 4/3 gradients each and 2/3 once.
Many at one theta, or restricted to each of several groups: from graphs made once, see curvature/linearisation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hessprobe.curvature.difference_steps import Named
from hessprobe.curvature.first_order_products import FIRST_ORDER
from hessprobe.curvature.forward_mode import check_forward_mode, detached, moving
from hessprobe.curvature.linearisation import Linearisation, NotLinearisable
from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.operator import Blocks
from hessprobe.curvature.tangents import linearised, reverse_tangents
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.objective import Batch, Objective


class GaussNewton(ModelOperator):
    """The Gauss-Newton matrix G of the mean loss per token, a p x p positive semi-definite operator.

    Cost of `apply` on (k, p) rows, in gradients by operation count: 1.67 for k = 1, 1.33 k + 0.67 for more; through
    double backward, where the model has no forward mode, 2.33 k. Restricted to the columns and rows of a block, no
    tangent is computed below the block and no gradient outside it. `group_diagonal` takes (K + 6) / 3 for K groups.

    Source: G as in Abreu et al. 2025 (arXiv 2510.09378), section 3; products as in Schraudolph 2002.
    """

    ENGINES = ("forward-mode", "double-backward", FIRST_ORDER)
    _keep = 0  # bytes of linearisations that may live on between products
    _kept: Mapping[int, tuple[Batch, Linearisation]] = MappingProxyType({})  # by the batch's id
    _linear: bool | None = None  # whether this model can be linearised; None: not tried yet
    _usual_layers = False  # whether its layers must stay as they are for that
    _twice = True  # whether reverse mode can be believed to differentiate it twice

    def linearised(self, keep: int) -> GaussNewton:
        """Returns G at the present theta for many products with single rows: the network's linearisation is kept.

        A product then takes 4/3 of a gradient, (K + 3) / 3 restricted to each of K groups, and 2/3 or (K + 3) / 6 for
        tangents alone; in a batch's first product 1 more. Where the model cannot be linearised, as without it.

        Args:
            keep: bytes that linearisations may hold; micro-batches beyond it are linearised anew in every product.
        """
        found = self.fixed()
        found._keep, found._kept = keep, {}
        return found

    def tangents(self, batch: Batch, directions: Tensor, groups: Sequence[Blocks]) -> tuple[Tensor, Tensor]:
        """Returns z (n, c) of one of the `pieces`, and J_S d_S (k, g, n, c) for each direction d (k, p) and group S.

        Cost: (g + 3) / 6 gradients of the piece a direction, and 1 where it is not linearised yet.
        """
        names = [self.names_in(group) for group in groups]
        rows = [self.partition.unflatten(d) for d in directions]
        if self.engine != FIRST_ORDER:
            try:
                return self._exact_tangents(batch, rows, names)
            except (RuntimeError, NotImplementedError) as refusal:
                if is_out_of_memory(refusal) or FIRST_ORDER not in self._engines:
                    raise
                self._engines, self._fallen = [FIRST_ORDER], True
        found = self._tangents_by_differences(batch, rows, names)
        self._say()
        return found

    def _exact_tangents(
        self, batch: Batch, rows: Sequence[dict[str, Tensor]], names: Sequence[tuple[str, ...]]
    ) -> tuple[Tensor, Tensor]:
        with measuring(self.objective.model):
            while self._may_linearise():
                try:
                    z_and_j = self._linearisation(batch)
                    found = [torch.stack([z_and_j.tangent(row, own) for own in names]) for row in rows]
                    return z_and_j.outputs, torch.stack(found)
                except (RuntimeError, NotImplementedError) as refusal:
                    if self._refused(refusal):
                        self._linear = False
            theta = self.leaves(())
            passes = [
                linearised(self.objective, batch, theta, row, names, reverse=self._twice) for row in rows
            ]
        return passes[0][0], torch.stack([torch.stack(found) for _, found in passes])

    def _tangents_by_differences(
        self, batch: Batch, rows: Sequence[Named], names: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Costs 2/3 of a gradient for each direction and group, and 1/3."""
        z = self.first_order.passes.outputs(batch)
        found = []
        for row in rows:
            for own in names:
                along = {name: row[name] for name in own}
                e = self.first_order.step(along)
                found.append(self._tangent(batch, along, e) if e else torch.zeros_like(z))
        return z, torch.stack(found).view(len(rows), len(names), *z.shape)

    def _own(self, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        found = self._by_linearisation(v, ((columns, rows),)) if self._keep else None
        return super()._own(v, columns, rows) if found is None else found

    def _own_groups(self, v: Tensor, groups: Sequence[tuple[Blocks, Blocks]]) -> Tensor:
        found = self._by_linearisation(v, groups) if self._keep or len(groups) > 1 else None
        return super()._own_groups(v, groups) if found is None else found

    def _by_linearisation(self, v: Tensor, groups: Sequence[tuple[Blocks, Blocks]]) -> Tensor | None:
        """Returns the sum of products restricted to each group (columns, rows), or None where that cannot be had."""
        names = [(self.names_in(columns), self.names_in(rows)) for columns, rows in groups]
        while self._may_linearise():
            product = torch.zeros_like(v)
            try:
                with measuring(self.objective.model):
                    for batch in self.pieces:
                        z_and_j = self._linearisation(batch)
                        z = z_and_j.outputs
                        for row, into in zip(v, product, strict=True):
                            d, shares = self.partition.unflatten(row), self.partition.unflatten(into)
                            for moved, wanted in names:
                                curved = self._curve(z, batch, z_and_j.tangent(d, moved))
                                back = z_and_j.pull_back(curved, wanted)
                                torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
                                    [shares[name] for name in back], list(back.values())
                                )
                return product
            except (RuntimeError, NotImplementedError) as refusal:
                if self._refused(refusal) and not self._cut_finer():
                    self._linear = False
        return None

    def _may_linearise(self) -> bool:
        return self._linear is not False and "double-backward" in self._engines

    def _refused(self, refusal: Exception) -> bool:
        """Draws the consequence of a failure; tells whether memory ran out though nothing was kept."""
        if not is_out_of_memory(refusal):
            self._kept = {}
            if self._usual_layers:
                self._linear, self._twice = False, not isinstance(refusal, NotLinearisable)
            else:
                self._linear, self._usual_layers = None, True
            return False
        nothing_kept = not self._kept
        self._keep, self._kept = 0, {}
        return nothing_kept

    def _linearisation(self, batch: Batch) -> Linearisation:
        """Returns a piece's linearisation, kept or made now; the first is checked."""
        if id(batch) in self._kept:
            return self._kept[id(batch)][1]
        found = Linearisation(
            self.objective, batch, self.leaves(), counted=self._keep > 0, usual_layers=self._usual_layers
        )
        if self._linear is None:
            found.check([self.partition.parameters_of(block) for block in self.partition.blocks])
            self._linear = True
        if found.bytes + sum(graph.bytes for _, graph in self._kept.values()) <= self._keep > 0:
            self._kept = {**self._kept, id(batch): (batch, found)}
        return found

    def _product(self, engine: str, k: int) -> Callable[..., Tensor]:
        if engine == "double-backward":
            return self._double_backward if k == 1 else self._one_by_one
        return self._dual_pass if k == 1 else self._batched_passes

    def _by_differences(self, batch: Batch, v: Named, e: float, wanted: Sequence[str]) -> Named:
        """Costs 2 forward passes and a gradient: 5/3 gradients."""
        jv = self._tangent(batch, v, e)
        return self.first_order.passes.pulled_back(batch, lambda z: self._curve(z, batch, jv), wanted)

    def _tangent(self, batch: Batch, v: Named, e: float) -> Tensor:
        """Returns J v (n, c) from the outputs at theta + e v and theta - e v."""
        return (
            self.first_order.passes.outputs(batch, v, e)
            .sub_(self.first_order.passes.outputs(batch, v, -e))
            .div_(2 * e)
        )

    def _curve(self, outputs: Tensor, batch: Batch, tangents: Tensor) -> Tensor:
        """Returns (1/N) (d2 loss / dz2) tangents."""
        targets = self.objective.targets(batch)
        return self.objective.loss_function.hessian_product(outputs.detach(), targets, tangents) / self.weight

    def _dual_pass(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        tangents = self.partition.unflatten(v[0])
        moved, wanted = self.names_in(columns), self.names_in(rows)
        z, jv, pull_back = dual_pass(self.objective, batch, self.leaves(()), tangents, moved, wanted)
        return self.flatten_rows(pull_back(self._curve(z, batch, jv)), 1)

    def _batched_passes(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        wanted, moved = self.names_in(rows), self.names_in(columns)
        leaves = self.leaves(wanted)
        fixed = {name: leaf.detach() for name, leaf in leaves.items()}
        tangents = self.partition.unflatten(v)

        def outputs(moving: dict[str, Tensor]) -> Tensor:
            return self.objective.outputs(batch, {**fixed, **moving})

        def along(t: dict[str, Tensor]) -> Tensor:
            return torch.func.jvp(outputs, ({name: fixed[name] for name in moved},), (t,))[1]

        check_forward_mode(self.objective, batch, fixed)
        # Nothing wants gradients here: the tangents need no reverse graph, only z does.
        jv = torch.func.vmap(along)({name: tangents[name] for name in moved})

        def pulled_back() -> list[Tensor]:
            z = self.objective.outputs(batch, leaves)
            return _pull_back(z, [leaves[name] for name in wanted], self._curve(z, batch, jv), batched=True)

        pulled = with_parameters(self.objective.model, leaves, pulled_back)
        return self.flatten_rows(dict(zip(wanted, pulled, strict=True)), v.shape[0])

    def _double_backward(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        wanted, moved = self.names_in(rows), self.names_in(columns)
        leaves = self.leaves(self.partition.names)

        def there_and_back() -> list[Tensor]:
            z = self.objective.outputs(batch, leaves)
            (jv,) = reverse_tangents(z, leaves, self.partition.unflatten(v[0]), [moved])
            return _pull_back(z, [leaves[name] for name in wanted], self._curve(z, batch, jv))

        back = with_parameters(self.objective.model, leaves, there_and_back)
        return self.flatten_rows(dict(zip(wanted, back, strict=True)), 1)

    def _one_by_one(self, batch: Batch, v: Tensor, columns: Blocks, rows: Blocks) -> Tensor:
        return torch.cat([self._double_backward(batch, row, columns, rows) for row in v.split(1)])


def dual_pass(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    moved: Sequence[str],
    wanted: Sequence[str],
) -> tuple[Tensor, Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Returns outputs z (n, c), the tangent J v (n, c), and w -> J^T w by name, from one forward pass.

    Args:
        theta: all partitioned parameters by name.
        tangents: v by name; only its entries `moved` count, all other parameters stand still.
        wanted: the parameters that J^T w is wanted for. The function serves once: it frees its graph as it goes.
    """
    check_forward_mode(objective, batch, theta)
    fixed = detached(theta)
    # The dual numbers lie BELOW the level at which vjp records, so tangents leave no reverse graph behind (no_grad() would
    # stop the tangents themselves). And the dual level ends before the pull-back: inside it, that would carry tangents too.
    with forward_ad.dual_level():
        duals = moving(fixed, tangents, moved)

        def outputs(own: dict[str, Tensor]) -> Tensor:
            return objective.outputs(batch, {**duals, **own})

        dual, pull_back, *_ = torch.func.vjp(outputs, {name: duals[name] for name in wanted})
        z, jv = forward_ad.unpack_dual(dual)
        jv = torch.zeros_like(z) if jv is None else jv

    def transposed(w: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return pull_back(w, retain_graph=False, create_graph=False)[0]

    return z, jv, transposed


def _pull_back(z: Tensor, leaves: list[Tensor], cotangent: Tensor, batched: bool = False) -> list[Tensor]:
    """Returns J^T cotangent per leaf, with zeros for a leaf on which the outputs do not depend."""
    if not z.requires_grad:  # the outputs depend on none of these leaves
        grads = [None] * len(leaves)
    else:
        grads = torch.autograd.grad(z, leaves, cotangent, allow_unused=True, is_grads_batched=batched)
    lead = cotangent.shape[:1] if batched else ()
    return [x.new_zeros(*lead, *x.shape) if g is None else g for x, g in zip(leaves, grads, strict=True)]
