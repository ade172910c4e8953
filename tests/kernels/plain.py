"""What kernels are judged by: per-sequence gradients by plain autograd on the whole model, and a stream to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.kernels.grams import Grams
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, Plan, first_plan
from hessprobe.kernels.stream import Stream
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition

Outputs = Callable[[nn.Module, Any], Tensor]


class Given:
    """Cotangents fixed in advance: the same for hessprobe's passes and for the plain ones, by (micro-batch, round)."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], rounds: int, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.drawn = [
            [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(rounds)]
            for shape in shapes
        ]

    def __call__(self, number: int, r: int, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.drawn[number][r].to(outputs).view_as(outputs)


def default_outputs(model: nn.Module, batch: Any) -> Tensor:
    """Returns the outputs (b, ..., c) of an (inputs, targets) batch."""
    return model(batch[0])


def rows_of(
    model: nn.Module,
    batches: Sequence[Any],
    drawn: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    outputs: Outputs = default_outputs,
) -> dict[str, Tensor]:
    """Returns every sketch's gradient by parameter, (m, q), m = (micro-batch, round, sequence) in that order."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    named = dict(model.named_parameters())
    inputs = [named[name] for name in names]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch, rounds in zip(batches, drawn, strict=True):
        z = outputs(model, batch)
        for cotangent in rounds:
            c = cotangent.to(z).reshape(z.shape)
            for b in range(z.shape[0]):
                only = torch.zeros_like(c)
                only[b] = c[b]
                grads = torch.autograd.grad(z, inputs, only, retain_graph=True, allow_unused=True)
                for name, x, g in zip(names, inputs, grads, strict=True):
                    found[name].append((torch.zeros_like(x) if g is None else g).reshape(-1))
    for module, mode in modes.items():
        module.training = mode
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def blocks_of(rows: Mapping[str, Tensor], partition: Partition) -> Tensor:
    """Returns the sketches (m, p) in the partition's order."""
    return torch.cat([rows[name] for name in partition.names], 1)


def kernel_of(rows: Tensor, partition: Partition) -> Tensor:
    """Returns the Gram matrix of every block of sketches (m, p), (l, m, m)."""
    return torch.stack([rows[:, where] @ rows[:, where].mT for where in partition.slices.values()])


def streamed(
    objective: Objective,
    batches: Sequence[Any],
    partition: Partition,
    cotangents: Given,
    plan: Plan | str | None = None,
    **options: Any,
) -> Grams:
    """Returns what a stream gathers; plan "fast" takes every fast path unchecked, a fallback's name all of it."""
    if plan is None or plan == "fast":
        plan = first_plan(objective, partition)
    elif isinstance(plan, str):
        assert plan in (ONE_SEQUENCE, MASKED)
        plan = Plan(taps=(), fallback=partition.names, how=plan)
    theta = options.pop("theta", None)
    stream = Stream(objective, partition, plan, theta=theta, **options)
    return stream.run(objective.counted(list(batches)), len(cotangents.drawn[0]), cotangents)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest deviation of any block, over that block's largest wanted entry."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    gaps = (got.double() - wanted.double()).abs().flatten(1).amax(1)
    return float((gaps / wanted.double().abs().flatten(1).amax(1).clamp_min(1e-300)).max())
