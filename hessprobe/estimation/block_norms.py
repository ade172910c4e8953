"""||A_ij||_F^2 for every pair of blocks of any operator, and the coupling made of them.

E|(A v)_i|^2 = ||A_ij||_F^2 for random signs v on block j (Hutchinson 1989). This is the reference estimator: it costs
l x samples products, where the layer kernels of the Gauss-Newton matrix need a few gradients for all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.estimation.sampling import Estimate, check_samples, rademacher


def block_norm_samples(operator: CurvatureOperator, samples: int, *, generator: torch.Generator) -> Tensor:
    """Returns (k, l, l) independent unbiased samples of ||A_ij||_F^2, each symmetric in i and j.

    Cost: l x samples products, each with tangents in one block alone.

    Raises:
        UserError: fewer than 2 samples.
    """
    check_samples(samples)
    partition = operator.partition
    slices = partition.slices
    found = torch.empty(samples, len(slices), len(slices), dtype=operator.dtype, device=operator.device)
    for j, (block, where) in enumerate(slices.items()):
        v = torch.zeros(samples, operator.size, dtype=operator.dtype, device=operator.device)
        v[:, where] = rademacher(
            samples,
            where.stop - where.start,
            generator=generator,
            dtype=operator.dtype,
            device=operator.device,
        )
        product = operator.apply(v, columns=(block,))
        for i, rows in enumerate(slices.values()):
            found[:, i, j] = product[:, rows].square().sum(1)
    # ||A_ij|| = ||A_ji||, and the two come from different probes: their mean has less variance than either.
    return 0.5 * (found + found.mT)


def block_norms(operator: CurvatureOperator, samples: int, *, generator: torch.Generator) -> Estimate:
    """Returns ||A_ij||_F^2 for every pair of blocks, an (l, l) estimate, unbiased.

    Args:
        operator: any curvature operator, indefinite ones included.
        samples: probes per block; the standard error falls as 1/sqrt(samples).
        generator: where the probes come from.

    Cost: l x samples products. Source: Hutchinson 1989.

    Raises:
        UserError: fewer than 2 samples.
    """
    return Estimate.of(block_norm_samples(operator, samples, generator=generator))


def coupling_of(block_norms: Tensor) -> Tensor:
    """Returns fro2[i,j] / sqrt(fro2[i,i] fro2[j,j]) from (..., l, l) block norms: the linear CKA of two layers."""
    diagonal = torch.diagonal(block_norms, dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return block_norms / (diagonal[..., :, None] * diagonal[..., None, :])


def off_block_energy_of(block_norms: Tensor) -> Tensor:
    """Returns the share of ||A||_F^2 outside the diagonal blocks, from (..., l, l) block norms."""
    diagonal = torch.diagonal(block_norms, dim1=-2, dim2=-1).sum(-1)
    return 1 - diagonal / block_norms.sum((-2, -1))


def symmetry_gap(operator: CurvatureOperator, *, generator: torch.Generator) -> float:
    """Returns |u.Av - v.Au| / (|u||Av|) for two random vectors, a self-check: rounding if A's products are right.

    Cost: 2 products.
    """
    signs = rademacher(2, operator.size, generator=generator, dtype=operator.dtype, device=operator.device)
    av, au = operator.apply(signs)[[1, 0]]
    u, v = signs
    return float((u @ av - v @ au).abs() / (u.norm() * av.norm()))
