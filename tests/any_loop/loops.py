"""Training loops as people write them, each a way in which a recorder could get under somebody's feet."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES, WIDTH, SEQUENCES = 4, 6, 8


class Counted(nn.Module):
    """Counts its calls in a buffer, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class LowRank(nn.Module):
    """A frozen matrix with a trainable correction of rank 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def build(hidden: type[nn.Module] = nn.Linear, counted: bool = True) -> nn.Module:
    """Returns a classifier with dropout, batch statistics and a counter, its weights drawn by seed 0."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), *([Counted()] if counted else []),
            nn.Dropout(0.3), hidden(8, 8), nn.Tanh(), nn.Linear(8, CLASSES),
        )  # fmt: skip


def batches(count: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(SEQUENCES, WIDTH, generator=generator),
            torch.randint(CLASSES, (SEQUENCES,), generator=generator),
        )


class Loop(NamedTuple):
    """A loop's parts: what is trained, by what, and one step over a list of micro-batches."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: Callable[[list[Any]], None]
    accumulated: int = 1


def _plain(model: nn.Module, *optimizers: torch.optim.Optimizer, accumulated: int = 1) -> Loop:
    found = list(optimizers) or [torch.optim.AdamW(model.parameters(), lr=1e-2)]

    def step(micro: list[Any]) -> None:
        for optimizer in found:
            optimizer.zero_grad()
        for x, y in micro:
            (cross_entropy(model(x), y) / len(micro)).backward()
        for optimizer in found:
            optimizer.step()

    return Loop(model, found, step, accumulated)


def plain() -> Loop:
    return _plain(build())


def accumulation() -> Loop:
    return _plain(build(), accumulated=3)


def frozen_and_low_rank() -> Loop:
    model = build(LowRank)
    model[0].requires_grad_(False)  # type: ignore[index]
    return _plain(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))


def several_optimizers() -> Loop:
    model = build()
    matrices = [model[5].weight]  # type: ignore[index]
    rest = [p for p in model.parameters() if p is not matrices[0]]
    return _plain(model, torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2))


def compiled() -> Loop:
    return _plain(torch.compile(build(counted=False), backend="eager"))  # type: ignore[arg-type]


def compiled_in_place() -> Loop:
    model = build(counted=False)
    model.compile(backend="eager")
    return _plain(model)


def mixed_precision() -> Loop:
    """bf16 autocast with a scaler whose scale is so large that a step is skipped."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)

    def step(micro: list[Any]) -> None:
        optimizer.zero_grad()
        for x, y in micro:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = 16 * cross_entropy(model(x), y)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return Loop(model, [optimizer], step)


LOOPS = {
    make.__name__: make
    for make in (
        plain, accumulation, frozen_and_low_rank, several_optimizers, compiled, compiled_in_place, mixed_precision,
    )
}  # fmt: skip


def run(loop: Loop, steps: int, after: Callable[[int, list[Any]], object] | None = None) -> dict[str, Any]:
    """Trains and returns everything a recorder could have changed; `after` is called after every step."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    loop.model.train()
    stream = batches(steps * loop.accumulated)
    for step in range(steps):
        micro = [next(stream) for _ in range(loop.accumulated)]
        loop.step(micro)
        if after is not None:
            after(step, micro)
    return footprint(loop)


def footprint(loop: Loop) -> dict[str, Any]:
    """Returns weights, buffers, gradients, optimizer states, random states, modes and hooks as they are."""
    modules = list(loop.model.modules())
    return {
        "weights": {name: x.detach().clone() for name, x in loop.model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in loop.model.named_parameters()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in loop.optimizers],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
        "modes": [module.training for module in modules],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks) for module in modules
        ],
        "grad enabled": torch.is_grad_enabled(),
    }  # fmt: skip
