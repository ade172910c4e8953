"""tr H where tr G is known: what random signs still have to say is tr R of R = H - G, most often a far quieter number.

Var v.A v = 2 sum_{i != j} A_ij^2 for signs v (Hutchinson 1989), so of two matrices whose traces differ by a known number
the one of smaller Frobenius norm takes fewer probes. The layer kernels know tr G for a few gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.estimation.sampling import Estimate, check_samples, rademacher
from hessprobe.estimation.trace import hutchinson_trace


def hessian_trace(
    gauss_newton: CurvatureOperator,
    hessian: CurvatureOperator,
    residual: CurvatureOperator,
    samples: int,
    *,
    known: Callable[[], Estimate],
    generator: torch.Generator,
) -> Estimate:
    """Returns tr H, unbiased: from probes of R and the known tr G, or from probes of H where H is the smaller one.

    A probe of its own decides, by |H u|^2 - |R u|^2 = |G u|^2 + 2 Gu.Ru: near initialisation R can be larger than H,
    and then nothing is gained. Elsewhere |R|_F^2 / |H|_F^2 as many probes do for the same error, once that of
    `known` is small beside it: about half as many rounds of kernels as probes.

    Args:
        gauss_newton, hessian, residual: G, H and R = H - G at one theta and batch; H and R `linearised` for many probes.
        samples: probes v, at least 2.
        known: called only where R is chosen; returns tr G of the same batch, such as
            lambda: layer_kernels(..., rounds=4, cotangent="sign", ...).trace("batch", whole=True)
            ("population" would be the error of another number).

    Cost: `samples` products of R or H, one of G and of R to decide, and what `known` takes where R is chosen. Errors of
    the two parts add in quadrature.

    Raises:
        UserError: fewer than 2 samples.
    """
    check_samples(samples)
    u = rademacher(1, residual.size, generator=generator, dtype=residual.dtype, device=residual.device)
    g, r = gauss_newton.apply(u)[0], residual.apply(u)[0]
    if not g @ g + 2 * g @ r > 0:
        return hutchinson_trace(hessian, samples, generator=generator)
    rest = hutchinson_trace(residual, samples, generator=generator)
    trace = known()
    return Estimate(
        mean=rest.mean + trace.mean.to(rest.mean),
        stderr=rest.stderr.hypot(trace.stderr.to(rest.stderr)),
        samples=samples,
    )
