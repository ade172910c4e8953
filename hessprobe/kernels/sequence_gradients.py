"""Per-sequence gradients for any parameter of any model: one sequence at a time, or the whole batch masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.kernels.plan import MASKED
from hessprobe.problem.objective import Batch, Objective, measuring, with_parameters
from hessprobe.problem.partition import Partition


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Measures, and eagerly: a compiled block would not see the hooks."""
    with measuring(model, forward_mode=False), torch.compiler.set_stance("force_eager"):
        yield


def outputs_of(objective: Objective, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """Returns the batch's outputs (n, c) at the parameters in place, under autocast where a dtype is given."""
    device = next(objective.model.parameters()).device.type
    with torch.autocast(device, autocast, enabled=autocast is not None):
        return objective.outputs(batch)


def sequence_gradients(
    objective: Objective,
    batch: Batch,
    partition: Partition,
    theta: Mapping[str, Tensor] | None,
    names: Sequence[str],
    cotangents: Sequence[Tensor],
    how: str,
    autocast: torch.dtype | None = None,
) -> list[list[Tensor]]:
    """Returns each sketch's gradients of the named parameters, rounds first, then sequences.

    Cost: about a gradient a round one sequence at a time; a gradient a sketch where the whole batch must run.
    """
    count, _ = objective.sequence_shape(batch)
    leaves = objective.leaves(partition, theta, names)
    inputs = [leaves[name] for name in names]
    found: list[list[list[Tensor]]] = [[] for _ in cotangents]

    def pulled(z: Tensor, cotangent: Tensor, keep: bool) -> list[Tensor]:
        if not z.requires_grad:
            return [torch.zeros_like(x) for x in inputs]
        grads = torch.autograd.grad(z, inputs, cotangent, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]

    def passes() -> None:
        whole = outputs_of(objective, batch, autocast) if how == MASKED else None
        for b in range(count):
            part = outputs_of(objective, _slice(batch, b, count), autocast) if whole is None else whole
            for r, cotangent in enumerate(cotangents):
                own = cotangent.view(count, -1, cotangent.shape[-1])
                if whole is None:
                    found[r].append(pulled(part, own[b], r < len(cotangents) - 1))
                else:
                    masked = torch.zeros_like(own)
                    masked[b] = own[b]
                    found[r].append(pulled(part, masked.view_as(cotangent), True))

    with_parameters(objective.model, leaves, passes)
    return [sketch for rounds in found for sketch in rounds]


def _slice(batch: Batch, b: int, count: int) -> Batch:
    """Returns sequence b of a batch: of every tensor in it whose first dimension counts the sequences."""

    def cut(x: object) -> object:
        return x[b : b + 1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == count else x

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(cut(x) for x in batch)
    raise UserError(f"cannot take single sequences from a batch of type {type(batch).__name__}")
