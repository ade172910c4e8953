"""From what users call a loss to the Loss: a name, one of torch's losses, or a function of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.problem.losses import AutogradLoss, BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from hessprobe.problem.torch_losses import torch_loss

LOSSES = ("cross_entropy", "squared_error", "mean_squared_error", "binary_cross_entropy")


def loss_named(loss: str | Callable[[Tensor, Tensor], Tensor] | Loss, ignore_index: int = -100) -> Loss:
    """Returns the loss for a name, or for one of torch's losses (a module, a function, a partial), or wraps a function.

    Raises:
        UserError: a name that is none of the closed forms, one of torch's losses that sums, or a function that needs more
            than outputs and targets.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        known = torch_loss(loss, ignore_index)
        if known is not None:
            return known
        _check_arguments(loss)
        return AutogradLoss(loss, ignore_index)
    if loss == "cross_entropy":
        return CrossEntropy(ignore_index)
    if loss in ("squared_error", "mean_squared_error"):
        return SquaredError(mean_over_outputs=loss == "mean_squared_error")
    if loss == "binary_cross_entropy":
        return BinaryCrossEntropy()
    raise unknown_name("loss", str(loss), [*LOSSES, "a function (outputs, targets) -> losses per token"])


def _check_arguments(loss: Callable[..., Tensor]) -> None:
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # built in C: nothing to be known before it is called
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise UserError(
            f"loss {name}: wanted a function of the outputs (n, c) and the targets (n, ...) and no more, got "
            f"{name}{signature}: bind what else it takes (functools.partial), or carry it in the targets (targets= of "
            "the objective)"
        ) from error
