"""The diagonal of G from gradients of sampled labels.

It is E[(sum_n J_n^T c_n)^2] / N, where the c_n are independent with covariance d2 loss / dz2 (the Gauss-Newton-Bartlett
estimator: Liu et al. 2023, arXiv 2305.14342, algorithm 2).

One draw's relative error is 1.4 for every entry, however many tokens: micro-batches drawn apart are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.problem.losses import Loss
from hessprobe.problem.mean_loss import pull_back
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition


def sampled_diagonal(
    objective: Objective,
    batches: Batch | list[Batch],
    partition: Partition,
    *,
    generator: torch.Generator,
    parameters: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Returns an unbiased estimate of diag(G) (p,) of the mean loss per token; no entry is negative.

    Args:
        generator: of the labels, on the model's device or the CPU.
        parameters: theta by name; default: the model's own.

    Cost: one gradient.

    Raises:
        UserError: a loss whose Hessian has no known root.
    """
    listed = objective.micro_batches(batches)
    loss = objective.loss_function
    found = torch.zeros(())
    with measuring(objective.model, forward_mode=False):
        leaves = objective.leaves(partition, parameters)

        def drawn(batch: Batch) -> Tensor:
            z = objective.outputs(batch, leaves)
            cotangent = _drawn(loss, z.detach(), generator)
            cotangent *= loss.hessian_scale(z.detach(), objective.targets(batch)).sqrt()
            return pull_back(z, leaves, partition.names, cotangent)

        for batch in listed:
            sums = torch.zeros(())
            for piece in objective.pieces(batch):
                one = with_parameters(objective.model, leaves, lambda piece=piece: drawn(piece))
                sums = one if sums.dim() == 0 else sums.add_(one)
            found = sums.square_() if found.dim() == 0 else found.add_(sums.square_())
    return found / listed.weight


def _drawn(loss: Loss, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Returns independent rows (n, c) of mean zero, each with the covariance of its family's output Hessian."""
    device = generator.device
    if loss.family == "squared":
        noise = torch.randn(outputs.shape, generator=generator, device=device, dtype=outputs.dtype)
        return noise.to(outputs.device)
    if loss.family == "logistic":
        p = outputs.sigmoid()
        noise = torch.rand(outputs.shape, generator=generator, device=device, dtype=outputs.dtype)
        return p - (noise.to(p) < p).to(p)
    if loss.family is None:
        raise UserError(
            "diag(G) from sampled labels needs a loss with a known law of labels (cross-entropy, squared error, binary "
            "cross-entropy), got "
            f"{loss.name}: use one of them, or an optimizer other than sophia"
        )
    p = outputs.softmax(-1)
    labels = torch.multinomial(p.to(device), 1, generator=generator).to(outputs.device)
    return p.scatter_add(1, labels, p.new_full((1, 1), -1.0).expand_as(labels))
