"""How far differences of passes move the parameters: A v = (a(theta + e v) - a(theta - e v)) / 2e has an error of its own.

It is (t e^2)^2 + (r / e)^2, squared: the third derivative's part and that of rounding. Both are found once from products
at five e along one direction, on few sequences. What is kept of the best e is the movement of the outputs it makes,
e sqrt(v'Gv): another direction is moved until its outputs move as far, whatever its length and however steep it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessprobe.curvature.displaced import Displaced
from hessprobe.errors import UserError
from hessprobe.problem.objective import Batch

APART = 4.0  # from one e that is tried to the next
LARGEST = 0.1  # of relative errors: beyond it nothing is measured
_ROUNDS, _NEAR = 4, 2.0

Named = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepErrors:
    """Relative errors of products from differences, |found - A v| / |A v|, estimated along one direction.

    Attributes:
        distances: e |v| that were tried, ascending.
        errors: the estimated error at each of them.
        distance: the e |v| that is taken along this direction.
        movement: e sqrt(v'Gv) there, by which e is found for other directions.
        error: the estimated error there.
        exact: the distance there from the product by an exact engine, relative; None where the model has none.
        symmetry_gap: |u.Av - v.Au| / (|u * Av| + |v * Au|) with a random u, elementwise products.
    """

    distances: tuple[float, ...]
    errors: tuple[float, ...]
    distance: float
    movement: float
    error: float
    exact: float | None = None
    symmetry_gap: float = math.nan


class DifferenceSteps:
    """Finds e for each direction v, given by name, of one model operator.

    Args:
        passes: the model.
        sample: a batch of few sequences.
        product: (v, e) -> A v on the sample by name, restricted to v's own names.
        curve: (outputs, tangents) -> (d2 loss / dz2) tangents / N on the sample.
        exact: v -> A v on the sample by name through an exact engine, or None.
        agreed: what makes a number the same in all processes, where that is needed.

    Cost: two forward passes on the sample a direction; of the first one about eight products, and an exact one.
    """

    def __init__(
        self,
        passes: Displaced,
        sample: Batch,
        product: Callable[[Named, float], Named],
        curve: Callable[[Tensor, Tensor], Tensor],
        exact: Callable[[Named], Named | None],
        agreed: Callable[[float], float],
    ) -> None:
        self.passes, self.sample, self.product = passes, sample, product
        self.curve, self.exact, self.agreed = curve, exact, agreed
        self.errors: StepErrors | None = None
        self._scale = 0.0

    def of(self, v: Named) -> float:
        """Returns e for a direction that is finite and not zero.

        Raises:
            UserError: see `measure`; at the first direction.
        """
        length = _norm(v)
        if self.errors is None:
            found = self.measure(v)
            if found is None:
                return self._middle(v) / length
            return found.distance / length
        distance, target = self.errors.distance, self.errors.movement
        for _ in range(_ROUNDS):
            moved = self._movement(v, distance / length)
            wanted = self._bounded(distance * target / moved if moved > 0 else distance * APART**2, v)
            if 1 / _NEAR <= wanted / distance <= _NEAR:
                return wanted / length
            distance = wanted
        return distance / length

    def measure(self, v: Named) -> StepErrors | None:
        """Finds the best e along v and what products then are worth, and keeps it for all directions to come.

        Returns None, and keeps nothing, where A v is zero.

        Raises:
            UserError: the best e has an error above LARGEST, or products are not symmetric.
        """
        length, distance = _norm(v), self._middle(v)
        tried, best, error = [distance], distance, lambda e: math.nan
        for _ in range(_ROUNDS):
            tried = [distance * APART**i for i in (-2, -1, 0, 1, 2)]
            vectors = [_flat(self.product(v, d / length)) for d in tried]
            size = min(float(x.norm()) for x in vectors)
            if size == 0:
                return None
            gaps = [float((x - y).norm()) / size for x, y in itertools.pairwise(vectors)]
            best, error = _best(tried, gaps)
            best = self._bounded(best, v)
            if tried[1] <= best <= tried[-2] or best == distance:
                break
            distance = best
        best = self.agreed(best)
        found = StepErrors(
            distances=tuple(tried),
            errors=tuple(error(d) for d in tried),
            distance=best,
            movement=self._movement(v, best / length),
            error=error(best),
        )
        if not found.error < LARGEST:
            raise UserError(
                f"products from differences of passes have a relative error of {found.error:.1g} at the best of all steps "
                "on this model: likely its forward pass computes in half precision (measure it in float32), or is random"
            )
        self.errors = found  # `_checked` asks for e along another direction
        try:
            self.errors = found = self._checked(found, v)
        except BaseException:
            self.errors = None
            raise
        return found

    def _checked(self, found: StepErrors, v: Named) -> StepErrors:
        generator = torch.Generator().manual_seed(0)
        u = {n: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for n, x in v.items()}
        av = self.product(v, found.distance / _norm(v))
        au = self.product(u, self.of(u))
        there, back = (_flat({n: x[n] * ax[n] for n in x if n in ax}) for x, ax in ((u, av), (v, au)))
        gap = float((there.sum() - back.sum()).abs() / (there.norm() + back.norm()).clamp_min(1e-300))
        epsilon = torch.finfo(next(iter(v.values())).dtype).eps
        if not gap < 10 * found.error + epsilon**0.4:
            raise UserError(
                f"products from differences of passes are not symmetric on this model (gap {gap:.1e}): its backward pass is "
                "not the derivative of its forward pass (a custom function, a hook on a gradient)"
            )
        exact = self.exact(v)
        if exact is None:
            return replace(found, symmetry_gap=gap)
        wanted = _flat(exact)
        apart = float(
            (_flat({n: av.get(n, torch.zeros_like(v[n])) for n in exact}) - wanted).norm() / wanted.norm()
        )
        return replace(found, symmetry_gap=gap, exact=apart)

    def _movement(self, v: Named, e: float) -> float:
        """Returns e sqrt(v'Gv) on the sample: how far e v moves the outputs, in the metric of the loss."""
        up, down = self.passes.outputs(self.sample, v, e), self.passes.outputs(self.sample, v, -e)
        half = (up - down) / 2
        square = float((half.double() * self.curve((up + down) / 2, half).double()).sum())
        # Not finite: e moved the model out of its range, and must shrink.
        return self.agreed(max(square, 0.0) ** 0.5 if math.isfinite(square) else 1e30)

    def _middle(self, v: Named) -> float:
        """Returns the e |v| at which the search begins: the part of |theta| that balances e^2 and rounding / e."""
        self._scale = self._scale or self.passes.norm() or 1.0
        return torch.finfo(next(iter(v.values())).dtype).eps ** (1 / 3) * self._scale

    def _bounded(self, distance: float, v: Named) -> float:
        """Returns an e |v| that is neither lost in the rounding of theta nor as large as theta."""
        middle = self._middle(v)
        least = 8 * torch.finfo(next(iter(v.values())).dtype).eps * self._scale
        return min(max(distance, least, middle / APART**8), self._scale)


def _best(tried: list[float], gaps: list[float]) -> tuple[float, Callable[[float], float]]:
    """Returns the e of the least error, and the error at any, from relative gaps between neighbours' products.

    A gap's square is t^2 (e'^2 - e^2)^2 + r^2 (1/e^2 + 1/e'^2). Each gap thus bounds t and r from above, and the least of
    the bounds is nearest; where products have saturated a gap says nothing of t.
    """
    pairs = list(zip(tried, tried[1:], gaps, strict=False))
    rounding = min(gap / math.sqrt(1 / e**2 + 1 / f**2) for e, f, gap in pairs)
    bounds = [gap / (f**2 - e**2) for e, f, gap in pairs if gap < LARGEST]
    third = min(bounds) if bounds else gaps[0] / (tried[1] ** 2 - tried[0] ** 2)
    tiny = 1e-300
    best = (max(rounding, tiny) / (math.sqrt(2) * max(third, tiny))) ** (1 / 3)
    return best, lambda e: math.hypot(third * e**2, rounding / e)


def _flat(named: Named) -> Tensor:
    return torch.cat(
        [x.detach().double().reshape(-1) for x in named.values()] or [torch.zeros(0, dtype=torch.float64)]
    )


def _norm(named: Named) -> float:
    return float(_flat(named).norm())
