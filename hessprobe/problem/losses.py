"""Losses convex in the outputs: value, gradient and Hessian product with respect to the outputs, per token.

Cross-entropy and squared error are closed form (cross-entropy's Hessian product is p*u - p*(p.u), Schraudolph 2002);
any other convex loss goes through autograd. Everything is a sum over tokens with a target, never a mean: the
objective divides by the number of tokens of ALL micro-batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hessprobe.errors import UserError, unknown_name

# Entries of a (tokens, classes) tile worked on at once: bounds the temporaries at large vocabularies (64 MiB in fp32).
TILE = 2**24


class Loss:
    """A loss per token, convex in the outputs z (n, c); targets are y. All methods sum over valid tokens."""

    name: str

    def valid(self, targets: Tensor) -> Tensor:
        """Returns which of the n tokens carry a target, as a boolean (n,)."""
        return torch.ones(targets.shape[0], dtype=torch.bool, device=targets.device)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the sum of the loss over valid tokens, differentiable."""
        raise NotImplementedError

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns d value / d outputs (n, c), differentiable in the outputs."""
        raise NotImplementedError

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Returns (d2 value / d outputs2) applied to vectors (k, n, c) or (n, c), in their shape."""
        raise NotImplementedError


def _tiles(n: int, c: int) -> Iterator[slice]:
    rows = max(1, TILE // max(c, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


class CrossEntropy(Loss):
    """Softmax cross-entropy in nats; tokens whose target is `ignore_index` carry none."""

    name = "cross_entropy"

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def valid(self, targets: Tensor) -> Tensor:
        return targets != self.ignore_index

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, ignore_index=self.ignore_index, reduction="sum")

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        valid = self.valid(targets)
        one_hot = torch.zeros_like(outputs).scatter_(1, (targets * valid)[:, None], 1.0)
        return (outputs.softmax(-1) - one_hot) * valid[:, None]

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        valid = self.valid(targets)[:, None]
        product = torch.empty_like(vectors)
        for tile in _tiles(*outputs.shape):
            p = outputs[tile].softmax(-1) * valid[tile]
            pu = p * vectors[..., tile, :]
            product[..., tile, :] = torch.addcmul(pu, p, pu.sum(-1, keepdim=True), value=-1)
        return product


class SquaredError(Loss):
    """Half the squared distance per token, so that its output Hessian is the identity."""

    name = "squared_error"

    def valid(self, targets: Tensor) -> Tensor:
        if targets.dim() != 2:
            raise UserError(
                f"squared_error: wanted real targets, as many as outputs, got {targets.dtype} class labels: "
                "convert them (targets.to(outputs), one-hot for classes), or use loss='cross_entropy'"
            )
        return super().valid(targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return vectors


class AutogradLoss(Loss):
    """Any convex loss given as a function (outputs (n, c), targets (n, ...)) -> losses per token (n,)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], ignore_index: int = -100) -> None:
        self.function = function
        self.ignore_index = ignore_index
        self.name = getattr(function, "__name__", type(function).__name__)

    def valid(self, targets: Tensor) -> Tensor:
        if targets.dim() == 1 and not targets.is_floating_point():
            return targets != self.ignore_index
        return super().valid(targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self.function(outputs, targets)
        if losses.shape != outputs.shape[:1]:
            raise UserError(
                f"loss {self.name}: wanted one loss per token, shape {tuple(outputs.shape[:1])}, got "
                f"{tuple(losses.shape)}: return it unreduced (reduction='none')"
            )
        return torch.where(self.valid(targets), losses, 0.0).sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.func.grad(self.value)(outputs, targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        def along(u: Tensor) -> Tensor:
            return torch.func.jvp(lambda z: self.gradient(z, targets), (outputs,), (u,))[1]

        return torch.func.vmap(along)(vectors) if vectors.dim() == 3 else along(vectors)


LOSSES = ("cross_entropy", "squared_error")


def loss_named(loss: str | Callable[[Tensor, Tensor], Tensor] | Loss, ignore_index: int = -100) -> Loss:
    """Returns the loss for a name, or wraps a function.

    Raises:
        UserError: a name that is none of the closed forms, or a function that needs more than outputs and targets.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        _check_arguments(loss)
        return AutogradLoss(loss, ignore_index)
    if loss == "cross_entropy":
        return CrossEntropy(ignore_index)
    if loss == "squared_error":
        return SquaredError()
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
