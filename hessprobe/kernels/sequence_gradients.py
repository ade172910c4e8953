"""Per-sequence gradients for any parameter of any model: one sequence at a time, or the whole batch masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessprobe.kernels.plan import MASKED
from hessprobe.problem.leaves import Leaves
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Entries `start` to `stop` of one parameter, flat."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many entries."""
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these entries of a tensor of the parameter's shape."""
        return tensor.reshape(-1)[self.start : self.stop]


def within(entries: int, stretches: Sequence[Stretch], *, least: int) -> tuple[list[Stretch], list[Stretch]]:
    """Returns the first stretches that have so many entries together at most, and the others.

    Args:
        least: above 0, something is taken in any case, if need be the first stretch's first `entries`, or `least`.
    """
    taken, left = [], list(stretches)
    while left and left[0].size <= entries:
        entries -= left[0].size
        taken.append(left.pop(0))
    if left and least and not taken:
        first = left.pop(0)
        middle = min(first.start + max(least, entries), first.stop)
        taken.append(Stretch(name=first.name, start=first.start, stop=middle))
        if middle < first.stop:
            left.insert(0, Stretch(name=first.name, start=middle, stop=first.stop))
    return taken, left


@contextmanager
def watched(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Measures, and eagerly: a compiled block would not see the hooks."""
    with (
        measuring(model, forward_mode=False, autocast=autocast is not None),
        torch.compiler.set_stance("force_eager"),
    ):
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
    *,
    found: Callable[[int, int, Mapping[str, Tensor]], None],
    among: Sequence[int] | None = None,
) -> None:
    """Calls found(round, sequence, gradients by name) for each sketch in turn; none is kept.

    Args:
        names: the parameters.
        cotangents: of the whole batch (n, c), one a round.
        how: ONE_SEQUENCE or MASKED.
        among: the sequences wanted; default all.

    Cost: about a gradient a round one sequence at a time; a gradient a sketch where the whole batch must run.
    """
    count, _ = objective.sequence_shape(batch)
    leaves = Leaves(objective, partition, theta, names)

    def pulled(z: Tensor, cotangent: Tensor, keep: bool) -> dict[str, Tensor]:
        inputs = [leaves[name] for name in names]
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if z.requires_grad:
            grads = torch.autograd.grad(z, inputs, cotangent, retain_graph=keep, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
        return dict(zip(names, filled, strict=True))

    def passes() -> None:
        whole = outputs_of(objective, batch, autocast) if how == MASKED else None
        for b in range(count) if among is None else among:
            part = outputs_of(objective, objective.cut(batch, b, b + 1), autocast) if whole is None else whole
            for r, cotangent in enumerate(cotangents):
                own = cotangent.view(count, -1, cotangent.shape[-1])
                if whole is None:
                    found(r, b, pulled(part, own[b], r < len(cotangents) - 1))
                else:
                    masked = torch.zeros_like(own)
                    masked[b] = own[b]
                    found(r, b, pulled(part, masked.view_as(cotangent), True))

    leaves.run(passes)
