"""Random cotangents whose covariance is the loss's output Hessian, one set per round.

For labels drawn from the model, y^ ~ softmax(z), the gradient c = softmax(z) - onehot(y^) has mean zero and covariance
diag(p) - p p^T = d2 loss / dz2. Signs give the same covariance: c = sqrt(p) e - p (sqrt(p) . e), e = +-1. So does e
itself for squared error; and p - y^, y^ = 0 or 1, or sqrt(p (1 - p)) e, for each output of binary cross-entropy. What
weighs the loss (classes, smoothing) multiplies c by its root. "empirical" takes the data's own labels instead: the
empirical Fisher, NOT Gauss-Newton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.machine.devices import sent
from hessprobe.problem.losses import Loss

COTANGENTS = ("sampled", "sign", "empirical")


def draw_cotangent(
    kind: str, loss: Loss, outputs: Tensor, targets: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Returns one cotangent (n, c) per token: independent, mean zero, covariance d2 loss / dz2 at each valid token.

    Args:
        kind: "sampled" (labels from the model; Gaussian noise for squared errors), "sign", or "empirical".
        outputs: z (n, c), detached.
        generator: where the draws come from, on its own device, so that a seed means the same everywhere.

    Raises:
        UserError: an unknown kind, or a loss whose Hessian has no known root.
    """
    noise = _draw_noise(kind, loss, (outputs.shape[0], outputs.shape[1]), generator)
    return _cotangent(kind, loss, outputs, targets, noise)


class Draws:
    """The cotangents of every micro-batch and round: whoever asks again, or for some sequences alone, gets the same.

    They come micro-batch by micro-batch and round by round, also where others are asked for than the first, so that a
    process that runs a part of the batch has the numbers of one that runs all.

    Args:
        kind, loss: as for `draw_cotangent`.
        tokens: for each micro-batch, the tokens with a target of each of its sequences (b,), or their weight in the loss.
        positions: for each micro-batch, the positions of a sequence.
        rounds: of every micro-batch.
        generator: after `finish`, left where all that was drawn ends.
    """

    def __init__(
        self,
        kind: str,
        loss: Loss,
        tokens: Sequence[Tensor],
        positions: Sequence[int],
        rounds: int,
        *,
        generator: torch.Generator,
    ) -> None:
        self.kind, self.loss, self.tokens, self.generator = kind, loss, tokens, generator
        self.positions, self.rounds = positions, rounds
        self._states = [generator.get_state()]  # before every draw known, and after the last of them
        self._classes = 1

    def of(self, number: int, r: int, sequences: slice, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns cotangents (n, c) of these sequences of a micro-batch in round r, over sqrt(tokens of its sequence).

        Args:
            sequences: which of the micro-batch's sequences the outputs (n, c) and targets belong to.
        """
        tokens, self._classes = self.tokens[number], outputs.shape[1]
        # Those of all sequences are drawn, so that what each gets does not depend on its company.
        noise = self._noise(number * self.rounds + r)
        if noise is not None:
            noise = noise.view(len(tokens), self.positions[number], -1)[sequences].flatten(0, 1)
        drawn = _cotangent(self.kind, self.loss, outputs, targets, noise)
        own = tokens[sequences]
        # At least the cotangents' own precision: the square root of an integer tensor is float32.
        precision = torch.promote_types(drawn.dtype, torch.float32)
        scale = torch.where(own > 0, own, 1).double().sqrt().to(precision)[:, None, None]
        return (drawn.view(len(scale), self.positions[number], -1) / scale).view_as(drawn)

    def finish(self) -> None:
        """Leaves the generator behind the last draw of the last micro-batch, whichever were asked for."""
        last = len(self.tokens) * self.rounds
        if len(self._states) <= last:
            self._noise(last - 1)
        self.generator.set_state(self._states[last])

    def _noise(self, which: int) -> Tensor | None:
        """Returns the noise of draw `which` in order, of a whole micro-batch; those before it are drawn if they were not."""
        noise = None
        for i in range(min(which, len(self._states) - 1), which + 1):
            self.generator.set_state(self._states[i])
            number = i // self.rounds
            shape = (len(self.tokens[number]) * self.positions[number], self._classes)
            noise = _draw_noise(self.kind, self.loss, shape, self.generator)
            if i == len(self._states) - 1:
                self._states.append(self.generator.get_state())
        return noise


def _draw_noise(kind: str, loss: Loss, shape: tuple[int, int], generator: torch.Generator) -> Tensor | None:
    """Returns what is random in the cotangents of (n, c) outputs, on the generator's device: (n, 1) or (n, c)."""
    if kind not in COTANGENTS:
        raise unknown_name("cotangent", kind, COTANGENTS)
    if kind == "empirical":
        return None
    if loss.family is None:
        raise UserError(
            "layer kernels need a loss whose Hessian's root is known (cross_entropy, squared_error, mean_squared_error, "
            f"binary_cross_entropy, or torch's losses of these names), got {loss.name}: measure by products, which take "
            'any convex loss: probes={"cross_layer": {"method": "products"}} of a Recorder, '
            "--set cross_layer.method=products on the command line, block_norms(GaussNewton(...)) in Python"
        )
    device = generator.device
    if kind == "sign":
        return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8)
    if loss.family == "squared":
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
    labels = shape if loss.family == "logistic" else (shape[0], 1)
    return torch.rand(labels, generator=generator, device=device, dtype=torch.float64)


def _cotangent(kind: str, loss: Loss, outputs: Tensor, targets: Tensor, noise: Tensor | None) -> Tensor:
    """Returns the cotangent (n, c) that this noise stands for."""
    if noise is None:
        return loss.gradient(outputs, targets) * loss.valid(targets)[:, None]
    root = loss.hessian_scale(outputs, targets).sqrt()
    noise = sent(noise, outputs.device).to(outputs.dtype)
    if kind == "sign":
        noise = noise * 2 - 1
    if loss.family == "squared":
        return noise * root
    if loss.family == "logistic":
        p = outputs.sigmoid()
        return (noise * (p * (-outputs).sigmoid()).sqrt() if kind == "sign" else p - (noise < p).to(p)) * root
    p = outputs.softmax(-1)
    if kind == "sign":
        signed_root = p.sqrt() * noise
        # Its covariance is diag(p) - p p^T, since the entries of p sum to 1.
        return (signed_root - p * signed_root.sum(-1, keepdim=True)) * root
    cumulative = p.cumsum(-1)
    # Inverse distribution function; scaled by the last entry, which rounding keeps from being exactly 1.
    levels = noise * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, levels).clamp_max_(outputs.shape[1] - 1)
    return p.scatter_add(1, labels, p.new_full((1, 1), -1.0).expand_as(labels)) * root
