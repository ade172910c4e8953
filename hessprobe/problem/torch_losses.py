"""torch's own losses as users write them (modules, functions, partials), each as the closed form with its own mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.losses import AutogradLoss, BinaryCrossEntropy, CrossEntropy, Loss, SquaredError

CROSS_ENTROPY = (nn.CrossEntropyLoss, F.cross_entropy)
NEGATIVE_LOG_LIKELIHOOD = (nn.NLLLoss, F.nll_loss)
SQUARED = (nn.MSELoss, F.mse_loss)
BINARY = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
HUBER = (nn.HuberLoss, F.huber_loss)
# Convex losses of single numbers: the mean is over all of them, and derivatives are autograd's.
SINGLE_NUMBERS = (
    (nn.L1Loss, F.l1_loss),
    (nn.SmoothL1Loss, F.smooth_l1_loss),
    HUBER,
    (nn.SoftMarginLoss, F.soft_margin_loss),
)
IGNORED = -100


def torch_loss(loss: Callable[..., Tensor], ignore_index: int) -> Loss | None:
    """Returns one of torch's losses in closed form, None for any other function.

    Its mean is torch's: over the weights of the classes that occur, over tokens, or over tokens and outputs. One that is
    not reduced (reduction="none") stands for its mean too. The negative log-likelihood of logarithms of probabilities is
    cross-entropy of the same outputs: linear in them, it has its curvature in the softmax that the model ends with.

    Args:
        ignore_index: the objective's; the loss's own counts where it has another than torch's default.

    Raises:
        UserError: a loss that sums (reduction="sum"), or that is told to ignore another class than the objective is.
    """
    kind, settings = _taken_apart(loss)
    if kind is None:
        return None
    name = getattr(kind, "__name__", str(kind))
    if settings.get("reduction", "mean") == "sum":
        raise UserError(
            f"loss {name}: reduction='sum' makes curvature grow with the batch, and what is measured is a mean over all "
            "micro-batches: give it with reduction='mean', and scale what you read by the number of targets"
        )
    if kind in CROSS_ENTROPY or kind in NEGATIVE_LOG_LIKELIHOOD:
        own = settings.get("ignore_index", IGNORED)
        if own != ignore_index and IGNORED not in (own, ignore_index):
            raise UserError(
                f"loss {name} ignores class {own}, and ignore_index={ignore_index} another: give it once"
            )
        return CrossEntropy(
            ignore_index if own == IGNORED else own,
            settings.get("weight"),
            settings.get("label_smoothing", 0.0),
            of_logarithms=kind in NEGATIVE_LOG_LIKELIHOOD,
        )
    if kind in SQUARED:
        return SquaredError(mean_over_outputs=True) if settings.get("weight") is None else None
    if kind in BINARY:
        return BinaryCrossEntropy(settings.get("weight"), settings.get("pos_weight"))
    return AutogradLoss(_each_token(loss), ignore_index, mean_over_outputs=True)


def _taken_apart(loss: Callable[..., Tensor]) -> tuple[Any, dict[str, Any]]:
    """Returns which of torch's losses this is, and how it is set; (None, {}) for any other."""
    known = [
        one
        for pair in (CROSS_ENTROPY, NEGATIVE_LOG_LIKELIHOOD, SQUARED, BINARY, *SINGLE_NUMBERS)
        for one in pair
    ]
    if isinstance(loss, nn.Module):
        for kind in known:
            if isinstance(kind, type) and isinstance(loss, kind) and type(loss).forward is kind.forward:
                return kind, {**vars(loss), **dict(loss.named_buffers())}
        return None, {}
    settings: dict[str, Any] = {}
    while isinstance(loss, partial):
        if loss.args:
            return None, {}
        settings = {**loss.keywords, **settings}
        loss = loss.func
    return (loss, settings) if loss in known else (None, {})


def _each_token(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the loss unreduced, summed over each token's outputs: (n, c), (n, c) -> (n,)."""
    kind, settings = _taken_apart(loss)
    if kind in HUBER:  # delta times the smooth L1 loss, whose second derivative torch has in forward mode too
        each: Callable[..., Tensor] = partial(_huber, delta=settings.get("delta", 1.0))
    elif isinstance(loss, nn.Module):
        each = copy.copy(loss)
        each.reduction = "none"  # pyright: ignore[reportArgumentType]
    else:
        each = partial(loss, reduction="none")

    def summed(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise UserError(
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: this loss wants as many of both"
            )
        return each(outputs, targets).sum(-1)

    summed.__name__ = getattr(loss, "__name__", type(loss).__name__)
    return summed


def _huber(outputs: Tensor, targets: Tensor, delta: float) -> Tensor:
    return delta * F.smooth_l1_loss(outputs, targets, reduction="none", beta=delta)
