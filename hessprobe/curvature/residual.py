"""R v = (1/N) sum (dloss/dz) . d2z v, what the Hessian has beyond Gauss-Newton, in one pass instead of two.

R is the Hessian of c . z(theta) with the cotangent c = (1/N) dloss/dz held still (Schraudolph 2002), so a product costs
what one of H does, where H - G costs both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hessprobe.curvature.hessian import Hessian
from hessprobe.problem.objective import Batch


class Residual(Hessian):
    """The residual R = H - G of the mean loss per token, a p x p symmetric, indefinite operator; cost as `Hessian`."""

    def _cotangent(self, outputs: Tensor, batch: Batch) -> Tensor:
        # Its own tangent, or graph, is what makes the difference to H: that part is G.
        fixed = forward_ad.unpack_dual(outputs).primal.detach()
        return super()._cotangent(fixed, batch)

    def _difference_cotangent(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        fixed = self._cotangent(self.first_order.passes.outputs(batch), batch)  # 1/3 gradient more than H
        return lambda z: fixed
