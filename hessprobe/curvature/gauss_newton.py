"""G v = (1/N) J^T (d2 loss / dz2) J v without forming J (Schraudolph 2002; Martens 2010).

One vector: a single forward pass of dual numbers that keeps the reverse graph, 5/3 gradients by operation count.
Several: tangents batched over one linearisation, then batched pull-backs, 4/3 gradients each and 2/3 once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.operator import Blocks
from hessprobe.problem.memory import is_out_of_memory
from hessprobe.problem.objective import Batch, Objective, measuring, with_parameters
from hessprobe.problem.partition import Partition


class GaussNewton(ModelOperator):
    """The Gauss-Newton matrix G of the mean loss per token, a p x p positive semi-definite operator.

    Cost of `apply` on (k, p) rows, in gradients by operation count: 1.67 for k = 1, 1.33 k + 0.67 for more; through
    double backward, where the model has no forward mode, 2.33 k. Restricted to the columns and rows of a block, no
    tangent is computed below the block and no gradient outside it.

    Source: G as in Abreu et al. 2025 (arXiv 2510.09378), section 3; products as in Schraudolph 2002.
    """

    ENGINES = ("forward-mode", "double-backward")

    def _product(self, engine: str, k: int) -> Callable[..., Tensor]:
        if engine == "double-backward":
            return self._double_backward if k == 1 else self._one_by_one
        return self._dual_pass if k == 1 else self._batched_passes

    def _curve(self, outputs: Tensor, batch: Batch, tangents: Tensor) -> Tensor:
        """Returns (1/N) (d2 loss / dz2) tangents."""
        targets = self.objective.targets(batch)
        return self.objective.loss_function.hessian_product(outputs.detach(), targets, tangents) / self.tokens

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

        with torch.no_grad():  # the tangents need no reverse graph: only z does
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
    with torch.no_grad():
        # The dual numbers lie BELOW the level at which vjp records, so tangents leave no reverse graph behind. And
        # the dual level ends before the pull-back: inside it, the pull-back would carry tangents too.
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(x, tangents[n]) if n in moved else x for n, x in theta.items()}

            def outputs(own: dict[str, Tensor]) -> Tensor:
                return objective.outputs(batch, {**duals, **own})

            dual, pull_back, *_ = torch.func.vjp(outputs, {name: duals[name] for name in wanted})
            z, jv = forward_ad.unpack_dual(dual)
            jv = torch.zeros_like(z) if jv is None else jv

    def transposed(w: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return pull_back(w, retain_graph=False, create_graph=False)[0]

    return z, jv, transposed


def dual_outputs(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    moved: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Returns outputs z (n, c) and J v (n, c) for v on the parameters `moved`, without any graph."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(x, tangents[n]) if n in moved else x for n, x in theta.items()}
        z, jv = forward_ad.unpack_dual(objective.outputs(batch, duals))
        return z, torch.zeros_like(z) if jv is None else jv


def linearised(
    objective: Objective,
    batch: Batch,
    theta: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
) -> tuple[Tensor, list[Tensor]]:
    """Returns z (n, c) and, for each group of parameters, J v (n, c) for v on it alone, without a graph.

    By forward mode, or where the model has none through double backward. Cost: 2/3 of a gradient a group (a third
    more for z), at most.
    """
    try:
        passes = [dual_outputs(objective, batch, theta, tangents, names) for names in groups]
        return passes[0][0], [jv for _, jv in passes]
    except (RuntimeError, NotImplementedError) as refusal:  # the model has no forward mode
        if is_out_of_memory(refusal):
            raise
        leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}

        def by_reverse() -> tuple[Tensor, list[Tensor]]:
            z = objective.outputs(batch, leaves)
            return z.detach(), [jv.detach() for jv in reverse_tangents(z, leaves, tangents, groups)]

        return with_parameters(objective.model, leaves, by_reverse)


def block_tangents(
    objective: Objective, batch: Batch, partition: Partition, direction: Tensor, parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns outputs z (n, c) and J_i d_i (l, n, c) for every block i of a direction d (p,), without a graph.

    Cost: l tangent passes, each from its block upward; at most 0.67 l gradients.
    """
    theta, d = partition.unflatten(parameters.detach()), partition.unflatten(direction)
    groups = [partition.parameters_of(block) for block in partition.blocks]
    with measuring(objective.model):
        z, tangents = linearised(objective, batch, theta, d, groups)
    return z, torch.stack(tangents)


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


def _pull_back(z: Tensor, leaves: list[Tensor], cotangent: Tensor, batched: bool = False) -> list[Tensor]:
    """Returns J^T cotangent per leaf, with zeros for a leaf on which the outputs do not depend."""
    if not z.requires_grad:  # the outputs depend on none of these leaves
        grads = [None] * len(leaves)
    else:
        grads = torch.autograd.grad(z, leaves, cotangent, allow_unused=True, is_grads_batched=batched)
    lead = cotangent.shape[:1] if batched else ()
    return [x.new_zeros(*lead, *x.shape) if g is None else g for x, g in zip(leaves, grads, strict=True)]
