"""G, H and R = H - G on the same random signs: their norms, traces and overlap, and ratios whose noise largely cancels.

E|A v|^2 = ||A||_F^2, E v.A v = tr A, E (H v).(G v) = <H, G>_F for signs v (Hutchinson 1989).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.cost import rows_at_once
from hessprobe.curvature.model_operator import DEFAULT_MEMORY
from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.estimation.sampling import Estimate, check_samples, rademacher


@dataclass(frozen=True, kw_only=True)
class SharedProbes:
    """What each of k probes v says of G, H and R, in this order.

    Attributes:
        fro2: (k, 3) |A v|^2.
        trace: (k, 3) v.A v.
        overlap: (k,) (H v).(G v).
        symmetry_gap: |u.A v - v.A u| / (|u||A v|) of the first two probes, the larger one of G's and R's.
    """

    fro2: Tensor
    trace: Tensor
    overlap: Tensor
    symmetry_gap: float

    @property
    def norms(self) -> Estimate:
        """||A||_F^2 of the three."""
        return Estimate.of(self.fro2)

    @property
    def traces(self) -> Estimate:
        """Tr A of the three."""
        return Estimate.of(self.trace)

    def traces_given(self, known: Estimate) -> Estimate:
        """Returns tr A of the three, unbiased, where tr G is known from elsewhere: G's readings are a control variate.

        What v.G v shows too much takes with it, on average, <H, G> / |G|^2 of it in v.H v: that share comes off, each
        probe's from the other probes' readings (so it is independent of the probe's own). tr H is then as noisy as
        what of H is orthogonal to G, and H = G + R holds of the means as ever.

        Args:
            known: tr G () of the same matrix, from anything but these probes; its error is added in quadrature.
        """
        tr_g, stderr = (x.to(self.trace) for x in (known.mean, known.stderr))
        others = torch.stack([x.sum() - x for x in (self.overlap, self.fro2[:, 0])])
        share = (others[0] / others[1]).nan_to_num(nan=0.0)  # no G, nothing to take off
        shares = torch.stack([torch.ones_like(share), share, share - 1], 1)
        probes = Estimate.of(self.trace - shares * (self.trace[:, :1] - tr_g))
        return Estimate(
            mean=probes.mean, stderr=probes.stderr.hypot(shares.mean(0) * stderr), samples=probes.samples
        )

    @property
    def gap(self) -> Estimate:
        """||R||_F / ||G||_F."""
        return Estimate.jackknife(self.fro2, lambda mean: (mean[2] / mean[0]).sqrt())

    @property
    def cosine(self) -> Estimate:
        """<H, G>_F / (||H||_F ||G||_F)."""
        means = torch.cat([self.fro2[:, :2], self.overlap[:, None]], 1)
        return Estimate.jackknife(means, lambda mean: mean[2] / (mean[0] * mean[1]).sqrt())


def shared_probes(
    gauss_newton: CurvatureOperator,
    residual: CurvatureOperator,
    samples: int,
    *,
    generator: torch.Generator,
    block: str | None = None,
    memory: int = DEFAULT_MEMORY,
) -> SharedProbes:
    """Returns the probes' readings of G, R and H = G + R, of the whole matrices or of one diagonal block.

    Args:
        samples: probes, at least 2.
        generator: where their random signs come from.
        memory: bytes for the vectors held at once; more probes are done in turn.

    Cost: `samples` products with G and as many with R.

    Raises:
        UserError: fewer than 2 samples, or an unknown block.
    """
    check_samples(samples)
    partition = gauss_newton.partition
    if block is not None:
        partition.check(block)
    blocks = None if block is None else (block,)
    where = slice(0, partition.size) if block is None else partition.slices[block]
    found, gap = [], 0.0
    together = probes_at_once(samples, partition.size * gauss_newton.dtype.itemsize, memory)
    for first in range(0, samples, together):
        count = min(together, samples - first)
        v = torch.zeros(count, partition.size, dtype=gauss_newton.dtype, device=gauss_newton.device)
        signs = rademacher(
            count, where.stop - where.start, generator=generator, dtype=v.dtype, device=v.device
        )
        v[:, where] = signs
        g, r = (a.apply(v, columns=blocks, rows=blocks)[:, where] for a in (gauss_newton, residual))
        if not found:
            gap = max(_asymmetry(signs, product) for product in (g, r))
        found.append(_readings(signs, g, r))
    fro2, trace, overlap = torch.cat(found).double().split([3, 3, 1], dim=1)
    return SharedProbes(fro2=fro2, trace=trace, overlap=overlap[:, 0], symmetry_gap=gap)


def _readings(v: Tensor, g: Tensor, r: Tensor) -> Tensor:
    """Returns (k, 7): squared norms and quadratic forms of G, H and R, and the overlap of H with G."""
    dot = torch.linalg.vecdot
    gg, rr, gr = dot(g, g), dot(r, r), dot(g, r)
    vg, vr = dot(v, g), dot(v, r)
    return torch.stack([gg, gg + 2 * gr + rr, rr, vg, vg + vr, vr, gg + gr], 1)


def _asymmetry(v: Tensor, product: Tensor) -> float:
    gap = (v[0] @ product[1] - v[1] @ product[0]).abs()
    size = v[0].norm() * product[1].norm()
    return float(gap / size.clamp_min(torch.finfo(v.dtype).tiny))


def probes_at_once(samples: int, vector_bytes: int, memory: int) -> int:
    """Returns how many probes go together, with both products: the first two always do."""
    return rows_at_once(samples, memory, 3 * vector_bytes, least=2)
