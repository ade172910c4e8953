"""Models nobody tuned for, how plain code calls them, and a mixture of experts whose sequences compete for places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE
from tests.models import labels, redraw, seeded

VOCABULARY = 11


@dataclass
class Foreign:
    """A model, its micro-batches, how plain code gets its outputs (b, t, c), and which parameters fall back."""

    model: nn.Module
    batches: list[Any]
    outputs: Callable[[nn.Module, Any], Tensor]
    fallback: set[str] = field(default_factory=set)
    how: str = ONE_SEQUENCE
    tolerance: float = 1e-10


def scattered(model: nn.Module) -> nn.Module:
    """Returns the model redrawn in float64, away from its initial zeros and ones."""
    return redraw(model, seeded(3))


def pairs(*shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(6)
    return [
        (
            torch.randint(VOCABULARY, shape, generator=generator),
            labels(generator, VOCABULARY, *shape, ignore=0.2),
        )
        for shape in shapes
    ]


def called(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return z if z.dim() == 3 else z[:, None]


class Mixture(nn.Module):
    """Top-2 of four experts; an expert sees the tokens sent to it alone, and is skipped where there are none."""

    def __init__(self, capacity: bool = False) -> None:
        super().__init__()
        self.capacity = capacity
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.router = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(4)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).flatten(0, 1)
        weight, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            place, rank = torch.where(chosen == i)
            if self.capacity:  # a full expert turns away the batch's later tokens
                place, rank = place[:4], rank[:4]
            if len(place):
                out = out.index_add(0, place, expert(x[place]) * weight[place, rank, None])
        return self.head((x + out).view(*tokens.shape, -1))


EXPERTS = {f"experts.{i}.{j}.{name}" for i in range(4) for j in (0, 2) for name in ("weight", "bias")}


def mixture_with_capacity() -> Foreign:
    """Alone, a sequence would find other experts free: the whole batch has to run."""
    fallback = EXPERTS | {"router.weight"}
    return Foreign(scattered(Mixture(capacity=True)), pairs((3, 5), (2, 4)), called, fallback, MASKED)
