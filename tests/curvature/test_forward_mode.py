"""Tangents stop where gradients stop: products by every engine are those of plain backward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessprobe as hp
from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.residual import Residual
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.optimization.model_ladder import model_ladder
from tests import models, oracles
from tests.curvature.stopping_models import D, Reversed, Stopped, V
from tests.problem.stateful_models import jacobian_truth

EXACT = 1e-8


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.5)
    return h


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return 1 * h


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return h * 2


def switched(h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        stopped = h + 1
        with torch.enable_grad():
            going_on = h * 0.5
    return stopped + going_on


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda h: h,
    "detach": lambda h: h.detach(),
    "no_grad": without_gradients,
    "decorator": decorated,
    "set_grad_enabled": switched,
    "data": lambda h: h.data,
    "custom function": Reversed.apply,  # type: ignore[dict-item]
    "hook": hooked,
}
TABLES: dict[str, Callable[[], nn.Module]] = {
    "padding_idx": lambda: nn.Embedding(V, D, padding_idx=2),
    "negative padding_idx": lambda: nn.Embedding(V, D, padding_idx=-1),
    "sparse": lambda: nn.Embedding(V, D, sparse=True),
    "max_norm": lambda: nn.Embedding(V, D, max_norm=1.0),
    "bag": lambda: Bag(mode="mean"),
    "bag with padding": lambda: Bag(mode="sum", padding_idx=2),
    "sparse bag": lambda: Bag(mode="sum", sparse=True),
    "largest of a bag": lambda: Bag(mode="max"),
}


class Bag(nn.EmbeddingBag):
    """Bags of two neighbours at every place but the first, (b, t) -> (b, t, d)."""

    def __init__(self, **switches) -> None:
        super().__init__(V, D, **switches)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        pairs = torch.stack([x, x.roll(1, 1)], -1)
        return super().forward(pairs.flatten(0, 1)).view(*x.shape, D)


class Plain(nn.Module):
    """What a table computes, by indexing alone: torch's own have no second derivatives, or sparse ones."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.weight = (table,), nn.Parameter(table.weight.detach().clone())  # type: ignore[union-attr, operator]
        if getattr(table, "max_norm", None):
            self.weight = nn.Parameter(torch.renorm(self.weight.detach(), 2, 0, table.max_norm))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        table: Any = self.table[0]
        if not isinstance(table, Bag):
            return self.weight[x]
        pairs = torch.stack([x, x.roll(1, 1)], -1)
        rows = self.weight[pairs]
        if table.padding_idx is not None:
            rows = rows * (pairs != table.padding_idx)[..., None]
        return rows.amax(2) if table.mode == "max" else rows.sum(2) / (2 if table.mode == "mean" else 1)


def plain(model: nn.Module, kind: str) -> nn.Module:
    """Returns the model with its table by plain operations, where plain backward passes cannot do with it."""
    model = copy.deepcopy(model)
    if "bag" in kind or kind in ("sparse", "max_norm"):
        model.embedding = Plain(model.embedding)  # type: ignore[arg-type]
    return model


def made(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Stopped(STOPS.get(kind), TABLES[kind]() if kind in TABLES else None).double()
    x = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 2, 1, 3], [5, 4, 3, 2, 6]])
    return model, (x, x.flip(1))


@pytest.mark.parametrize("kind", [*STOPS, *TABLES])
def test_products_are_those_of_plain_backward_passes(kind: str) -> None:
    model, batch = made(kind)
    objective, partition = hp.Objective(model), hp.Partition.of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    g, h = jacobian_truth(plain(model, kind), batch, partition)
    eye = torch.eye(partition.size, dtype=torch.float64)
    found = hp.GaussNewton(objective, batch, partition)
    single = torch.cat([found.apply(row[None]) for row in eye[::11]])
    assert oracles.relative_error(single, g[::11]) < EXACT
    assert oracles.relative_error(found.apply(eye), g) < EXACT
    assert oracles.relative_error(found.linearised(2**28).apply(eye[::11]), g[::11]) < EXACT
    own = found.block_diagonal().apply(eye[::11])
    blocks = torch.block_diag(*[g[where, where] for where in partition.slices.values()])
    assert oracles.relative_error(own, blocks[::11]) < EXACT
    if kind != "hook":  # what a hook does to second derivatives is not one function's
        assert oracles.relative_error(hp.Hessian(objective, batch, partition).apply(eye), h) < EXACT
        single = torch.cat([hp.Hessian(objective, batch, partition).apply(row[None]) for row in eye[::11]])
        assert oracles.relative_error(single, h[::11]) < EXACT
        assert oracles.relative_error(Residual(objective, batch, partition).apply(eye), h - g) < EXACT
    d = torch.randn(partition.size, generator=models.seeded(2), dtype=torch.float64)
    along = curvature_along(found, d[None], groups=[partition.blocks])
    assert abs(float(along.curvature) - float(d @ g @ d)) < EXACT * float(d @ g @ d)
    ladder = model_ladder(objective, [batch], partition, d, parameters=partition.vector(model))
    assert abs(float(ladder.mean(ladder.curvature)) - float(d @ g @ d)) < EXACT * float(d @ g @ d)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("kind", ["padding_idx", "no_grad", "sparse", "sparse bag", "hook"])
def test_kernels_are_those_of_plain_backward_passes(kind: str) -> None:
    model, batch = made(kind)
    objective, partition = hp.Objective(model), hp.Partition.of(model, "parameter")
    found = layer_kernels(objective, batch, partition, generator=models.seeded(0), rounds=400)
    g, _ = jacobian_truth(plain(model, kind), batch, partition)
    traces = torch.stack([g[where, where].trace() for where in partition.slices.values()])
    estimates = found.kernel.double().diagonal(dim1=1, dim2=2)
    mean, stderr = estimates.mean(1), estimates.std(1) / estimates.shape[1] ** 0.5
    ratio = mean.sum() / traces.sum()
    assert ((mean / ratio - traces).abs() <= 5 * stderr / ratio + 1e-12).all()


def test_padding_that_only_a_later_batch_holds_is_right_too() -> None:
    model, (x, y) = made("padding_idx")
    objective, partition = hp.Objective(model), hp.Partition.of(model)
    hp.GaussNewton(objective, (x.clamp(min=3), y), partition).apply(
        torch.ones(1, partition.size, dtype=torch.float64)
    )
    found = hp.GaussNewton(objective, (x, y), partition)
    assert found.engine == "forward-mode"
    g, _ = jacobian_truth(model, (x, y), partition)
    eye = torch.eye(partition.size, dtype=torch.float64)
    assert oracles.relative_error(found.apply(eye), g) < EXACT and found.engine == "forward-mode"


def test_a_model_that_deceives_forward_mode_is_found_once_and_remembered() -> None:
    model, batch = made("custom function")
    objective, partition = hp.Objective(model), hp.Partition.of(model)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    v = torch.ones(1, partition.size, dtype=torch.float64)
    for expected in (2 + 2 + 1, 2 + 1):  # the check; the next engine's own, and its product
        operator = hp.GaussNewton(objective, batch, partition)
        calls.clear()
        operator.apply(v)
        assert operator.engine == "double-backward" and len(calls) == expected
