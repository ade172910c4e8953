"""How the loss and its models change along a direction: Gauss-Newton's quadratic, the prox-linear model, the loss.

With u = J d, token by token: alpha l'.u + alpha^2 u.l''u / 2, loss(z + alpha u), and the loss at theta + alpha d
(Abreu et al. 2025, section 3). What lies between two neighbours is one approximation's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.tangents import linearised
from hessprobe.problem.losses import Loss
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The models along a direction d, summed over the tokens of each of b sequences, in float64.

    Attributes:
        alphas: (a,) step lengths.
        tokens: (b,) tokens with a target; what the loss weighs them by, where it weighs them.
        slope: (b,) g.d, and curvature: (b,) d.G d, of each sequence's summed loss.
        prox_linear: (b, a) mean loss(z + alpha J d) less the loss at theta, summed over tokens.
        loss: (b, a) the same for the real loss at theta + alpha d.
    """

    alphas: Tensor
    tokens: Tensor
    slope: Tensor
    curvature: Tensor
    prox_linear: Tensor
    loss: Tensor

    @property
    def quadratic(self) -> Tensor:
        """(b, a) Gauss-Newton's quadratic less the loss at theta, summed over tokens."""
        return self.slope[:, None] * self.alphas + 0.5 * self.curvature[:, None] * self.alphas.square()

    def mean(self, sums: Tensor) -> Tensor:
        """Returns the mean over tokens of (b, ...) sums over sequences."""
        return sums.sum(0) / self.tokens.sum()

    def stderr(self, sums: Tensor) -> Tensor:
        """Returns the jackknife's standard error of `mean` over sequences, which may be of different lengths.

        NaN for one sequence.
        """
        count = int((self.tokens > 0).sum())
        live, tokens = sums[self.tokens > 0], self.tokens[self.tokens > 0]
        if count < 2:
            return torch.full_like(sums[0], torch.nan)
        rest = (tokens.sum() - tokens).reshape(-1, *[1] * (sums.dim() - 1))
        left_out = (live.sum(0) - live) / rest
        return ((left_out - left_out.mean(0)).square().sum(0) * (count - 1) / count).sqrt()


def model_ladder(
    objective: Objective,
    batches: Batch | Sequence[Batch],
    partition: Partition,
    direction: Tensor,
    alphas: Sequence[float] = (),
    *,
    parameters: Tensor,
) -> Ladder:
    """Returns the models of the loss along theta + alpha d.

    Differences are taken in float64 sequence by sequence, so that short steps keep their digits; the outputs
    themselves are as precise as the model.

    Args:
        direction: d (p,).
        alphas: step lengths a; none for slope and curvature alone.
        parameters: theta (p,).

    Cost: 1 gradient (a dual pass without a way back), and a third for each step length.
    """
    theta, d = partition.unflatten(parameters.detach()), partition.unflatten(direction)
    listed = objective.micro_batches(batches)
    found = torch.zeros(listed.sequences, 3 + 2 * len(alphas), dtype=torch.float64, device=parameters.device)
    with measuring(objective.model):
        for own in objective.share(listed):
            z, (jd,) = linearised(objective, own.batch, theta, d, [partition.names])
            with torch.no_grad():
                there = [
                    objective.outputs(own.batch, partition.unflatten(parameters + alpha * direction))
                    for alpha in alphas
                ]
                rows = torch.stack(_sequences(objective, own.batch, z, jd, there, alphas))
                found[own.first : own.first + len(rows)] = rows
    (found,) = objective.processes.total(found)
    tokens, slope, curvature, *changes = found.unbind(1)
    prox_linear, loss = torch.stack(changes, 1).chunk(2, 1) if changes else (slope[:, None][:, :0],) * 2
    return Ladder(
        alphas=torch.tensor(alphas, dtype=torch.float64, device=slope.device),
        tokens=tokens,
        slope=slope,
        curvature=curvature,
        prox_linear=prox_linear,
        loss=loss,
    )


def _sequences(
    objective: Objective, batch: Batch, z: Tensor, jd: Tensor, there: list[Tensor], alphas: Sequence[float]
) -> list[Tensor]:
    """Returns a row for each sequence of a batch: tokens, slope, curvature, changes of prox-linear model and loss."""
    targets, (count, length) = objective.targets(batch), objective.sequence_shape(batch)
    targets = targets.double() if targets.is_floating_point() else targets
    rows = []
    for i in range(count):
        at = slice(i * length, (i + 1) * length)
        moved = [outputs[at].double() for outputs in there]
        rows.append(
            _sequence(objective.loss_function, z[at].double(), jd[at].double(), moved, targets[at], alphas)
        )
    return rows


def _sequence(
    loss: Loss, z: Tensor, jd: Tensor, there: list[Tensor], targets: Tensor, alphas: Sequence[float]
) -> Tensor:
    start = loss.value(z, targets)
    return torch.stack([
        loss.weights(targets).sum().double(),
        (loss.gradient(z, targets) * jd).sum(),
        (loss.hessian_product(z, targets, jd) * jd).sum(),
        *(loss.value(z + alpha * jd, targets) - start for alpha in alphas),
        *(loss.value(moved, targets) - start for moved in there),
    ])  # fmt: skip
