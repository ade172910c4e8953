"""Random cotangents whose covariance is the loss's output Hessian, one set per round.

For labels drawn from the model, y^ ~ softmax(z), the gradient c = softmax(z) - onehot(y^) has mean zero and covariance
diag(p) - p p^T = d2 loss / dz2. Signs give the same covariance: c = sqrt(p) e - p (sqrt(p) . e), e = +-1. So does e
itself for squared error. "empirical" takes the data's own labels instead: the empirical Fisher, NOT Gauss-Newton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.problem.losses import Loss

COTANGENTS = ("sampled", "sign", "empirical")


def draw_cotangent(
    kind: str, loss: Loss, outputs: Tensor, targets: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Returns one cotangent (n, c) per token: independent, mean zero, covariance d2 loss / dz2 at each valid token.

    Args:
        kind: "sampled" (labels from the model; Gaussian noise for squared error), "sign", or "empirical".
        outputs: z (n, c), detached.
        generator: where the draws come from, on its own device, so that a seed means the same everywhere.

    Raises:
        UserError: an unknown kind, or a loss whose Hessian has no known root.
    """
    if kind not in COTANGENTS:
        raise unknown_name("cotangent", kind, COTANGENTS)
    valid = loss.valid(targets)[:, None]
    if kind == "empirical":
        return loss.gradient(outputs, targets) * valid
    if loss.name == "squared_error":
        return _noise(kind, outputs, generator) * valid
    if loss.name != "cross_entropy":
        raise UserError(
            f"layer kernels need a loss whose Hessian's root is known (cross_entropy, squared_error), got {loss.name}: "
            "use block_norms(GaussNewton(...)), the reference estimator, which takes any convex loss"
        )
    p = outputs.softmax(-1)
    if kind == "sign":
        signed_root = p.sqrt() * _noise(kind, outputs, generator)
        # Its covariance is diag(p) - p p^T, since the entries of p sum to 1.
        return (signed_root - p * signed_root.sum(-1, keepdim=True)) * valid
    cumulative = p.cumsum(-1)
    draws = torch.rand(outputs.shape[0], 1, generator=generator, device=generator.device, dtype=torch.float64)
    # Inverse distribution function; scaled by the last entry, which rounding keeps from being exactly 1.
    levels = draws.to(outputs.device, outputs.dtype) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, levels).clamp_max_(outputs.shape[1] - 1)
    return p.scatter_add(1, labels, p.new_full((1, 1), -1.0).expand_as(labels)) * valid


def _noise(kind: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "sign":
        signs = torch.randint(
            0, 2, like.shape, generator=generator, device=generator.device, dtype=torch.int8
        )
        return signs.to(like.device).to(like.dtype) * 2 - 1
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return noise.to(like.device, like.dtype)
