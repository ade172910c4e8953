"""Slope and curvature of the loss along a direction, for every group of blocks and pair of them, exact on the batch.

g_S.d_S = (1/N) sum dloss/dz . J_S d_S and d_S.G_ST d_T = <J_S d_S, (d2 loss/dz2) J_T d_T> / N: sums over tokens, so that
any part of the sequences has its share of both, and what a jackknife leaves out is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.operator import Blocks
from hessprobe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Along:
    """What k directions do to the loss to second order, in f folds of the sequences and between g groups of blocks.

    Attributes:
        slope: (k, f, g) each fold's part of g_S.d_S, float64, nats per token: their sum is the batch's.
        curvature: (k, f, g, g) each fold's part of d_S.G_ST d_T, float64.
        tokens: (f,) tokens with a target in each fold; what the loss weighs them by, where it weighs them.
    """

    slope: Tensor
    curvature: Tensor
    tokens: Tensor


def curvature_along(
    gauss_newton: GaussNewton,
    directions: Tensor,
    *,
    groups: Sequence[Blocks] | None = None,
    folds: int = 1,
) -> Along:
    """Returns slopes and curvatures along each row of directions (k, p), on the operator's batches.

    Args:
        groups: of blocks, taken together; default: every block on its own. One group of all gives g.d and d.Gd alone.
        folds: parts into which the sequences are divided, in their order, as equal as can be.

    A direction that is not finite has NaN everywhere. Cost: a linearisation, unless it is kept, and (g + 3) / 6
    gradients a direction, 2/3 for one group.

    Raises:
        UserError: directions of another shape, a block that does not exist, more folds than sequences, or none.
    """
    objective, partition = gauss_newton.objective, gauss_newton.partition
    if directions.dim() != 2 or directions.shape[1] != partition.size:
        raise UserError(
            f"directions: wanted (k, {partition.size:,}), got {tuple(directions.shape)}"
            + (": give one as d[None]" if directions.dim() == 1 else "")
        )
    groups = [(block,) for block in partition.blocks] if groups is None else groups
    partition.check(*(block for group in groups for block in group))
    sequences = gauss_newton.micro_batches.sequences
    if not 1 <= folds <= sequences:
        raise UserError(f"folds: wanted 1 to {sequences}, the batch's sequences, got {folds}")
    k, g, device = len(directions), len(groups), directions.device
    slope = torch.zeros(k, folds, g, dtype=torch.float64, device=device)
    curvature = torch.zeros(k, folds, g, g, dtype=torch.float64, device=device)
    tokens = torch.zeros(folds, dtype=torch.float64, device=device)
    sound = torch.isfinite(directions).all(dim=1)
    slope[~sound], curvature[~sound] = torch.nan, torch.nan
    first = gauss_newton.shares[0].first if gauss_newton.shares else 0
    for batch, (b, t) in zip(gauss_newton.pieces, gauss_newton.pieces.shapes, strict=True):
        targets = objective.targets(batch)
        fold_of = torch.arange(first, first + b) * folds // sequences
        first += b
        weights = objective.loss_function.weights(targets)
        rows = {f: (fold_of == f).repeat_interleave(t).nonzero()[:, 0] for f in fold_of.unique().tolist()}
        rows = {f: slice(int(of[0]), int(of[-1]) + 1) for f, of in rows.items()}
        for f, of in rows.items():
            tokens[f] += weights[of].sum()
        if not bool(sound.any()):
            continue
        z, tangents = gauss_newton.tangents(batch, directions[sound], groups)
        downhill = objective.loss_function.gradient(z, targets)
        for i, jd in zip(sound.nonzero()[:, 0].tolist(), tangents, strict=True):
            curved = objective.loss_function.hessian_product(z, targets, jd)
            for f, of in rows.items():
                slope[i, f] += (jd[:, of].flatten(1) @ downhill[of].flatten()).double()
                curvature[i, f] += (jd[:, of].flatten(1) @ curved[:, of].flatten(1).mT).double()
    slope, curvature, tokens = objective.processes.total(slope, curvature, tokens)
    slope /= gauss_newton.weight
    curvature /= 2 * gauss_newton.weight
    return Along(slope=slope, curvature=curvature + curvature.mT, tokens=tokens)
