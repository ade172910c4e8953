"""One batch of the preconditioner probe: candidates are built on it, or judged by it, at the theta of a snapshot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hessprobe.curvature import cost
from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.optimization.damped_solves import DampedSolutions, damped_solves
from hessprobe.optimization.place import Place
from hessprobe.problem.micro_batches import MicroBatches

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a direction d does on a batch to second order, in folds of its sequences and by groups of blocks.

    Attributes:
        slope: (f, g) each fold's part of g_S.d_S, nats per token.
        curvature: (f, g, g) each fold's part of d_S.G_ST d_T, undamped.
        norm2: (g,) |d_S|^2.
    """

    slope: np.ndarray
    curvature: np.ndarray
    norm2: np.ndarray

    @property
    def whole(self) -> Judged:
        """The same with all groups taken together, (f, 1) and (f, 1, 1)."""
        return Judged(
            slope=self.slope.sum(1, keepdims=True),
            curvature=self.curvature.sum((1, 2), keepdims=True),
            norm2=self.norm2.sum(keepdims=True),
        )

    def decrease(self, damping: float) -> np.ndarray:
        """Returns (g,) what the best step along each group's part alone decreases: slope^2 / (2 (d.Gd + mu |d|^2))."""
        slope, damped = self.slope.sum(0), self.damped(damping)
        # A group that does not move decreases nothing; one that is not finite is not called so.
        still = self.norm2 == 0
        return np.where(still, 0.0, slope**2 / np.where(still, 1.0, 2 * damped))

    def damped(self, damping: float) -> np.ndarray:
        """Returns (g,) d_S.(G_SS + mu) d_S."""
        return np.einsum("fgg->g", self.curvature) + damping * self.norm2


class Site:
    """Gradient, Gauss-Newton matrix and damped solves on one batch; `spent` counts gradients of this batch.

    Args:
        snapshot: theta, model and optimizer; its own batches are not read.
        batches: micro-batches of this site.
        folds: groups of sequences whose parts of slope and curvature are told apart.
        memory: bytes that a chunk of products may take, and that linearisations may hold.

    Raises:
        UserError: no target in the batch, or a gradient of zero.
        FloatingPointError: a loss or gradient that is not finite.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        batches: MicroBatches,
        recipe: PreconditionerRecipe,
        *,
        folds: int,
        memory: int,
    ) -> None:
        objective, partition = snapshot.objective, snapshot.partition
        self.recipe, self.partition, self.folds = recipe, partition, folds
        self.snapshot = replace(snapshot, batches=batches)
        self.sequences = batches.sequences
        self.loss, gradient = objective.gradient(batches, partition, snapshot.named_parameters)
        if not bool(torch.isfinite(gradient).all()) or not bool(torch.isfinite(self.loss)):
            raise FloatingPointError(f"the loss is {float(self.loss)}, and its gradient is not finite")
        if not bool(gradient.any()):
            raise UserError(
                "the gradient is zero: no direction leads down, so no preconditioner can be judged here"
            )
        self.place = Place(
            objective=objective,
            partition=partition,
            parameters=snapshot.parameters,
            batches=batches,
            gradient=gradient,
        )
        self.gauss_newton = GaussNewton(
            objective, batches, partition, parameters=snapshot.parameters, memory=memory, engine="exact"
        ).linearised(memory)
        self.spent = 2.0  # the gradient, and the linearisation
        self._solved: dict[Groups, DampedSolutions] = {}
        self.fold_tokens = np.full(folds, np.nan)  # known with the first direction judged
        self._judged: dict[
            bool, tuple[Tensor, Judged]
        ] = {}  # whether it is the update, and otherwise the last

    @property
    def full(self) -> Groups:
        """One group of all blocks."""
        return (self.partition.blocks,)

    @property
    def layerwise(self) -> Groups:
        """Every block a group."""
        return tuple((block,) for block in self.partition.blocks)

    def solve(self, groups: Groups) -> DampedSolutions:
        """Returns d = -(G_SS + mu)^-1 g_S for every damping of the recipe, solved once."""
        if groups not in self._solved:
            found = damped_solves(
                self.gauss_newton,
                -self.place.gradient,
                self.recipe.dampings,
                groups=groups,
                tolerance=self.recipe.cg_tolerance,
                iterations=self.recipe.cg_iterations,
            )
            self._solved[groups] = found
            self.spent += found.products * cost.gauss_newton_products(len(groups))
        return self._solved[groups]

    def judge(self, direction: Tensor, *, by_block: bool = False) -> Judged:
        """Returns slope and curvature along d (p,) on this batch.

        It remembers the last direction and the optimizer's step, which is the same for every curvature batch.
        """
        is_update = direction is self.snapshot.update
        known, found = self._judged.get(is_update, (None, None))
        if known is direction and found is not None and (len(found.norm2) > 1 or not by_block):
            return found if by_block else found.whole
        groups = self.layerwise if by_block else self.full
        along = curvature_along(self.gauss_newton, direction[None], groups=groups, folds=self.folds)
        self.spent += cost.tangents(len(groups))
        squares = direction.double().square()
        slices = self.partition.slices
        norm2 = [torch.stack([squares[slices[block]].sum() for block in group]).sum() for group in groups]
        self.fold_tokens = along.tokens.double().cpu().numpy()
        found = Judged(
            slope=along.slope[0].cpu().numpy(),
            curvature=along.curvature[0].cpu().numpy(),
            norm2=torch.stack(norm2).cpu().numpy(),
        )
        self._judged[is_update] = (direction, found)
        return found

    def optimal_decrease(self) -> np.ndarray:
        """Returns (s,) g.G_mu^-1 g / 2 for every damping: what the best step along the solution decreases, so at most it."""
        pairs = zip(self.recipe.dampings, self.solve(self.full).x, strict=True)
        found = [float(self.judge(d).decrease(mu)[0]) for mu, d in pairs]
        return np.array([decrease if decrease > 0 else np.nan for decrease in found])

    def block_optimal_decrease(self) -> np.ndarray:
        """Returns (l,) g_i.(G_ii + mu)^-1 g_i / 2 of every block, at the first damping."""
        d = self.solve(self.layerwise).x[0]
        found = self.judge(d, by_block=True).decrease(self.recipe.dampings[0])
        return np.where(found > 0, found, np.nan)


def jackknife_stderr(judged: Judged, damping: float, tokens: np.ndarray) -> float:
    """Returns the standard error over folds of the decrease along a direction; NaN for one fold."""
    share = tokens / tokens.sum()
    f = len(share)
    if f < 2 or bool((share >= 1).any()):
        return np.nan
    slope, curvature = judged.slope.sum(1), judged.curvature.sum((1, 2))
    left_slope = (slope.sum() - slope) / (1 - share)
    left_curvature = (curvature.sum() - curvature) / (1 - share)
    left_out = left_slope**2 / (2 * (left_curvature + damping * judged.norm2.sum()))
    return float(np.sqrt((f - 1) / f * np.sum((left_out - left_out.mean()) ** 2)))
