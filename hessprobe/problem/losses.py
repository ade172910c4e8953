"""Losses convex in the outputs: value, gradient and Hessian product with respect to the outputs, per token.

Softmax cross-entropy, squared error and binary cross-entropy are closed form: each one's output Hessian is that of its
family (softmax: diag(p) - p p^T, Schraudolph 2002; squared: the identity; logistic: diag(p (1 - p))) times a scale that
class weights, smoothing and the like make. Any other convex loss goes through autograd. Everything is a sum over tokens
with a target, never a mean: the objective divides by the weights of ALL micro-batches' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.problem.loss_checks import (
    are_log_probabilities,
    check_classes,
    check_log_probabilities,
    check_probabilities,
    check_real,
    linear_in_logarithms,
)

# Entries of a (tokens, classes) tile worked on at once: bounds the temporaries at large vocabularies (64 MiB in fp32).
TILE = 2**24


class Loss:
    """A loss per token, convex in the outputs z (n, c); targets are y. All methods sum over valid tokens.

    Attributes:
        name: how messages call it.
        family: "softmax", "squared" or "logistic", whose output Hessians have known roots; None: any other.
    """

    name: str
    family: str | None = None
    looks_at_outputs = False  # whether `check_outputs` has anything to say
    real_targets = False  # whether targets are numbers (n, c), as many as outputs, each with a loss
    mean_over_outputs = False  # whether the mean is over the c outputs of a token too

    def check(self, targets: Tensor, classes: int | None = None) -> None:
        """Raises a UserError for targets that this loss cannot be meant for; `classes`: how many outputs a token has."""
        if self.real_targets:
            check_real(self.name, targets)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Raises a UserError for outputs (n, c) that this loss cannot be meant for."""

    def valid(self, targets: Tensor) -> Tensor:
        """Returns which of the n tokens carry a target, as a boolean (n,)."""
        if self.real_targets:
            check_real(self.name, targets)
        return torch.ones(targets.shape[0], dtype=torch.bool, device=targets.device)

    def weights(self, targets: Tensor) -> Tensor:
        """Returns what each token adds to the number (n,) by which the mean divides: 1 for a target, unless weighted."""
        valid = self.valid(targets)
        return valid * targets.shape[1] if self.mean_over_outputs and targets.dim() > 1 else valid

    def hessian_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns s (n, 1) or (n, c) >= 0: the output Hessian is sqrt(s) (that of the family) sqrt(s)."""
        return self.valid(targets)[:, None].to(outputs.dtype)

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
    """Softmax cross-entropy in nats, as torch's: -sum_c q_c log p_c, of classes or of probabilities (n, c).

    Class weights and label smoothing are in q, which need not sum to 1: gradient (sum q) p - q, output Hessian
    (sum q) (diag(p) - p p^T). Weighted classes are averaged over their weights, everything else over tokens.

    Args:
        ignore_index: tokens whose class is this one carry no target.
        weight: of each class (c,).
        label_smoothing: the share of every token's target that all classes have alike.
        of_logarithms: outputs are logarithms of probabilities, of which it is the negative log-likelihood: softmax gives
            back the probabilities, so that values and curvature are those of the loss with its softmax.
    """

    family = "softmax"

    def __init__(
        self,
        ignore_index: int = -100,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        *,
        of_logarithms: bool = False,
    ) -> None:
        self.ignore_index = ignore_index
        self.weight = None if weight is None else weight.detach()
        self.label_smoothing = label_smoothing
        self.plain = weight is None and not label_smoothing
        said = ["class weights"] * (weight is not None) + [f"label_smoothing={label_smoothing}"] * bool(
            label_smoothing
        )
        self.of_logarithms = self.looks_at_outputs = of_logarithms
        named = "nll_loss" if of_logarithms else "cross_entropy"
        self.name = f"{named} ({', '.join(said)})" if said else named

    def check(self, targets: Tensor, classes: int | None = None) -> None:
        if targets.is_floating_point():
            check_probabilities(self.name, targets)
        else:
            check_classes(self.name, targets, self.ignore_index, classes)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        if self.of_logarithms:
            check_log_probabilities(self.name, outputs)

    def valid(self, targets: Tensor) -> Tensor:
        return super().valid(targets) if targets.is_floating_point() else targets != self.ignore_index

    def weights(self, targets: Tensor) -> Tensor:
        valid = self.valid(targets)
        if self.weight is None or targets.is_floating_point():
            return valid
        return self.weight.to(targets.device)[targets * valid] * valid

    def hessian_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.plain and not targets.is_floating_point():
            return super().hessian_scale(outputs, targets)
        return self._spread(outputs, targets).sum(-1, keepdim=True)

    def _spread(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns q (n, c): the targets as they are spread over the classes, zero where there is none."""
        weight = torch.ones_like(outputs[:1]) if self.weight is None else self.weight.to(outputs)[None]
        even = self.label_smoothing / outputs.shape[1]
        if targets.is_floating_point():
            return weight * ((1 - self.label_smoothing) * targets.to(outputs) + even)
        valid = self.valid(targets)[:, None]
        labels = targets[:, None] * valid
        own = weight.expand_as(outputs).gather(1, labels) * (1 - self.label_smoothing)
        return (even * weight).expand_as(outputs).scatter_add(1, labels, own) * valid

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            outputs,
            targets.to(outputs) if targets.is_floating_point() else targets,
            None if self.weight is None else self.weight.to(outputs),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not self.plain or targets.is_floating_point():
            spread = self._spread(outputs.detach(), targets)
            return outputs.softmax(-1) * spread.sum(-1, keepdim=True) - spread
        valid = self.valid(targets)
        one_hot = torch.zeros_like(outputs).scatter_(1, (targets * valid)[:, None], 1.0)
        return (outputs.softmax(-1) - one_hot) * valid[:, None]

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        scale = self.hessian_scale(outputs, targets)
        product = torch.empty_like(vectors)
        for tile in _tiles(*outputs.shape):
            p = outputs[tile].softmax(-1)
            pu = p * scale[tile] * vectors[..., tile, :]
            product[..., tile, :] = torch.addcmul(pu, p, pu.sum(-1, keepdim=True), value=-1)
        return product


class SquaredError(Loss):
    """Half the squared distance per token, or the mean over tokens and outputs of the squared difference, as torch's.

    Args:
        mean_over_outputs: the second, "mean_squared_error".
    """

    family = "squared"
    real_targets = True

    def __init__(self, *, mean_over_outputs: bool = False) -> None:
        self.mean_over_outputs = mean_over_outputs
        self.factor = 2.0 if mean_over_outputs else 1.0  # what its Hessian is, times the identity
        self.name = "mean_squared_error" if mean_over_outputs else "squared_error"

    def hessian_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.factor * super().hessian_scale(outputs, targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * self.factor * (outputs - targets).square().sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        difference = outputs - targets
        return 2 * difference if self.mean_over_outputs else difference

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return 2 * vectors if self.mean_over_outputs else vectors


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy of each output's own label in [0, 1], the mean over tokens and outputs, as torch's.

    With a = weight (1 + (pos_weight - 1) y): gradient weight (1 - y) - a (1 - p), output Hessian a p (1 - p).

    Args:
        weight: of each output, (c,) or a number; the mean does not divide by it.
        pos_weight: of labels 1, (c,) or a number.
    """

    family = "logistic"
    real_targets = mean_over_outputs = True

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        for name, given in (("weight", weight), ("pos_weight", pos_weight)):
            if given is not None and given.dim() > 1:
                raise UserError(
                    f"binary_cross_entropy: {name} wanted one number, or one for each output (c,), got "
                    f"{tuple(given.shape)}: give the loss as a function (outputs, targets) -> losses per token"
                )
        self.weight = None if weight is None else weight.detach()
        self.pos_weight = None if pos_weight is None else pos_weight.detach()
        said = ["weight"] * (weight is not None) + ["pos_weight"] * (pos_weight is not None)
        self.name = f"binary_cross_entropy ({', '.join(said)})" if said else "binary_cross_entropy"

    def _factors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (n, c): what multiplies log(1 - p) and log p, less their signs."""
        weight = (
            torch.ones_like(outputs) if self.weight is None else self.weight.to(outputs).expand_as(outputs)
        )
        y = targets.to(outputs)
        positive = y if self.pos_weight is None else self.pos_weight.to(outputs) * y
        return weight * (1 - y), weight * positive

    def hessian_scale(self, outputs: Tensor, targets: Tensor) -> Tensor:
        negative, positive = self._factors(outputs, targets)
        return negative + positive

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        negative, positive = self._factors(outputs, targets)
        return (negative * F.softplus(outputs) + positive * F.softplus(-outputs)).sum()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        negative, positive = self._factors(outputs.detach(), targets)
        return negative * outputs.sigmoid() - positive * (-outputs).sigmoid()

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return self.hessian_scale(outputs, targets) * outputs.sigmoid() * (-outputs).sigmoid() * vectors


class AutogradLoss(Loss):
    """Any convex loss given as a function (outputs (n, c), targets (n, ...)) -> losses per token (n,).

    Args:
        mean_over_outputs: the mean is over the c outputs of a token too, as of torch's losses of single numbers.
    """

    looks_at_outputs = True

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        ignore_index: int = -100,
        *,
        mean_over_outputs: bool = False,
    ) -> None:
        self.function = function
        self.ignore_index = ignore_index
        self.mean_over_outputs = mean_over_outputs
        self.name = getattr(function, "__name__", type(function).__name__)

    def valid(self, targets: Tensor) -> Tensor:
        if targets.dim() == 1 and not targets.is_floating_point():
            return targets != self.ignore_index
        return super().valid(targets)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        if are_log_probabilities(outputs) and self.is_linear(outputs, targets):
            raise UserError(linear_in_logarithms(self.name))

    def is_linear(self, outputs: Tensor, targets: Tensor) -> bool:
        """Tells whether the loss has no curvature in these outputs: then G is 0, and all of H is the model's own."""
        outputs = outputs.detach()
        return not bool(self.hessian_product(outputs, targets, torch.ones_like(outputs) + outputs).any())

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
