"""Small decoders and texts for streamed kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.kernels.plan import Plan
from hessprobe.kernels.verification import verified_plan
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models
from tests.kernels.plain import Given, blocks_of, kernel_of, rows_of, streamed
from tests.models import redraw, seeded

VOCABULARY = 6


def tiny(vocabulary: int = VOCABULARY, **switches: Any) -> nn.Module:
    """Returns a decoder of one layer in float64."""
    settings = {
        "layers": 1,
        "width": 4,
        "feedforward": 6,
        "heads": 2,
        "vocabulary": vocabulary,
        "context": 8,
    } | switches
    return redraw(Decoder(DecoderConfig(**settings), generator=seeded(0)), seeded(1))


def text(
    *shapes: tuple[int, int], vocabulary: int = VOCABULARY, seed: int = 2
) -> list[tuple[Tensor, Tensor]]:
    """Returns micro-batches of tokens, some without a target."""
    return models._text(seeded(seed), vocabulary, *shapes, ignore=0.3)


class Setting:
    """A model with its micro-batches, cotangents fixed in advance, and the kernels of plain autograd."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any] | None = None,
        *,
        rounds: int = 2,
        by: str = "parameter",
        loss: str = "cross_entropy",
        **options: Any,
    ) -> None:
        self.model, self.batches = model, batches or text((3, 4), (2, 6))
        self.objective = Objective(model, loss=loss, **options)
        self.partition = Partition.of(model, by)
        with torch.no_grad():
            shapes = [self.model(batch[0]).shape for batch in self.batches]
        self.cotangents = Given(shapes, rounds)

    def truth(self, model: nn.Module | None = None) -> Tensor:
        rows = rows_of(model or self.model, self.batches, self.cotangents.drawn, self.partition.names)
        self.rows = blocks_of(rows, self.partition)
        return kernel_of(self.rows, self.partition)

    def plan(self) -> Plan:
        return verified_plan(self.objective, self.batches[0], self.partition)

    def kernel(self, plan: Plan | str | None = None, **options: Any) -> Tensor:
        found = streamed(
            self.objective, self.batches, self.partition, self.cotangents, plan or self.plan(), **options
        )
        return found.kernel


class Bare(nn.Module):
    """Parameters outside modules, at positions and in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.positions = nn.Parameter(torch.empty(8, 4))
        self.matrix = nn.Parameter(torch.empty(4, 4))
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((self.embedding(x) + self.positions[: x.shape[1]]) @ self.matrix))


class Outside(nn.Module):
    """A module's weight used outside its forward as well: its inputs and outputs do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.embedding(x)))
        return self.head(h + 0.5 * (h @ self.body.weight))


class Mixed(nn.Module):
    """One sequence's outputs depend on the others' inputs, before and after a module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.embedding(x)))
        return self.head(h + h.mean(0, keepdim=True))
