"""Measuring leaves a model's parameters, buffers and state the very objects with the very bits, whatever it looks like."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import hessprobe as hp
from hessprobe.curvature.diagonal import sampled_diagonal
from hessprobe.curvature.kronecker import kronecker_factors
from hessprobe.curvature.residual import Residual
from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.problem.measuring import with_parameters
from hessprobe.problem.module_state import ModuleState
from tests import models, oracles
from tests.problem.stateful_models import (
    STATES,
    D,
    Looped,
    Net,
    Recurrent,
    Stateful,
    TwoNames,
    V,
    jacobian_truth,
)


class Plain(nn.Module):
    """Its parameter is in a plain list, in a tuple and under another plain name too, and each is what it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scales = (
            nn.Parameter(torch.empty(D, D)),
            nn.ParameterList([torch.ones(D), torch.ones(D)]),
        )
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(D))})
        self.weights, self.pair = [self.weight], (self.weight, {"w": self.weight})
        self.__dict__["again"] = self.weight

    def forward(self, h: Tensor) -> Tensor:
        h = h @ self.weights[0] * self.scales[0] + self.named["shift"]
        return torch.tanh(h @ self.pair[0] + h @ self.pair[1]["w"] + h @ self.again * self.scales[1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.attention(h, h, h)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Looped()

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.inner, h, use_reentrant=False)


def tied() -> nn.Module:
    net = Net(nn.Tanh())
    net.head.weight = net.embedding.weight
    return net


def weight_normed() -> nn.Module:
    return Net(parametrizations.weight_norm(nn.Linear(D, D)))


def spectral() -> nn.Module:
    return Net(parametrizations.spectral_norm(nn.Linear(D, D)))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def parametrized() -> nn.Module:
    layer = nn.Linear(D, D)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return Net(layer)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return Net(nn.utils.weight_norm(nn.Linear(D, D)))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "looped": lambda: Net(Looped()),
    "two_names": TwoNames,
    "plain": lambda: Net(Plain()),
    "recurrent": lambda: Net(Recurrent()),
    "attending": lambda: Net(Attending()),
    "encoder_layer": lambda: Net(nn.TransformerEncoderLayer(D, 2, 6, activation="gelu", batch_first=True)),
    "checkpointed": lambda: Net(Checkpointed()),
    "tied": tied,
    "wrapped": lambda: nn.Sequential(Net(Looped())),
    "weight_norm": weight_normed,
    "spectral_norm": spectral,
    "parametrized": parametrized,
    "old_weight_norm": old_weight_norm,
}


def problem(name: str) -> models.Problem:
    """Returns a problem of tests/models.py, or one of this file's shapes."""
    if name in models.ZOO:
        return models.ZOO[name](models.seeded(0))
    torch.manual_seed(0)
    model = models.redraw(SHAPES[name](), models.seeded(0))
    batch = torch.randint(0, V, (2, 3, 5), generator=models.seeded(1))
    return models.Problem(model, [(batch[0], batch[1])], "cross_entropy")


def fingerprint(model: nn.Module) -> Iterator[Any]:
    """Yields what must be the same after a measurement: objects by identity, and their bits."""
    yield [id(p) for p in model.parameters()]
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, id(module), module.training
        for kind in (module._parameters, module._buffers):
            yield [
                (key, id(x), None if x is None else x.detach().clone().tolist()) for key, x in kind.items()
            ]
        yield [(key, id(value)) for key, value in module.__dict__.items()]
        flat = module.__dict__.get("_flat_weights", [])
        yield [id(x) for x in flat]


def measured(given: models.Problem) -> None:
    """Takes every kind of measurement."""
    objective, partition = hp.Objective(given.model, given.loss), hp.Partition.of(given.model, "parameter")
    batches: Any = given.batches
    v = torch.ones(2, partition.size, dtype=torch.float64)
    g = hp.GaussNewton(objective, batches, partition)
    g.apply(v), g.apply(v[:1]), g.linearised(2**28).apply(v[:1]), g.block_diagonal().apply(v[:1])
    hp.Hessian(objective, batches, partition).apply(v)
    Residual(objective, batches, partition).linearised(2**28).apply(v[:1])
    objective.gradient(batches, partition)
    if not callable(given.loss):
        layer_kernels(objective, batches, partition, generator=models.seeded(0))
        sampled_diagonal(objective, batches, partition, generator=models.seeded(0))
        try:
            theta = partition.unflatten(partition.vector(given.model) + 0.1)
            kronecker_factors(objective, batches, partition, generator=models.seeded(0), parameters=theta)
        except UserError as refusal:
            assert "K-FAC" in str(refusal)  # noqa: PT017 (either is right)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*models.ZOO, *SHAPES])
def test_every_measurement_leaves_the_same_objects_with_the_same_bits(name: str) -> None:
    given = problem(name)
    before = list(fingerprint(given.model))
    measured(given)
    assert list(fingerprint(given.model)) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_the_dense_ones_whatever_holds_the_parameters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(name)
    objective, partition = hp.Objective(given.model, given.loss), hp.Partition.of(given.model, "parameter")
    with monkeypatch.context() as patch:
        # Torch's own kernel is not symmetric in its second derivatives (torch 2.13): by plain operations here.
        for holder in (torch, sys.modules["torch.nn.utils.weight_norm"]):
            patch.setattr(holder, "_weight_norm", plain_weight_norm)
        g, h = jacobian_truth(given.model, given.batches[0], partition)
    eye = torch.eye(partition.size, dtype=torch.float64)
    for kind, truth in ((hp.GaussNewton, g), (hp.Hessian, h)):
        found = kind(objective, given.batches, partition)  # type: ignore[arg-type]
        assert oracles.relative_error(found.apply(eye), truth) < 1e-8
        assert oracles.relative_error(found.apply(eye[:1]), truth[:1]) < 1e-8


def plain_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / v.square().sum(1, keepdim=True).sqrt())


# -- the swap ----------------------------------------------------------------------------------------------


def test_swaps_nest_and_end_after_an_exception() -> None:
    model = problem("looped").model
    before = list(fingerprint(model))
    name, own = next(iter(model.named_parameters()))
    outer, inner = torch.ones_like(own), torch.zeros_like(own)

    def fails() -> None:
        assert model.get_parameter(name) is inner
        raise RuntimeError("inside")

    def nested() -> None:
        with pytest.raises(RuntimeError, match="inside"):
            with_parameters(model, {name: inner}, fails)
        assert dict(model.named_parameters())[name] is outer

    model.get_parameter = lambda n: dict(model.named_parameters())[n]  # type: ignore[method-assign, assignment]
    before = list(fingerprint(model))
    with_parameters(model, {name: outer}, nested)
    assert list(fingerprint(model)) == before


@pytest.mark.parametrize("change", ["gone", "another shape"])
def test_parameters_that_have_changed_are_named(change: str) -> None:
    model = Net(nn.Linear(D, D)).double()
    objective, partition = hp.Objective(model), hp.Partition.of(model, "parameter")
    x, y = torch.randint(0, V, (2, 3, 5), generator=models.seeded(1))
    operator = hp.GaussNewton(objective, (x, y), partition)
    v = torch.ones(1, partition.size, dtype=torch.float64)
    operator.apply(v)
    model.embedding = nn.Embedding(V + 3, D).double()
    if change == "gone":
        del model._modules["embedding"]
        model.embedding = lambda x: torch.zeros(*x.shape, D, dtype=torch.float64)  # type: ignore[assignment]
    for attempt in (
        lambda: operator.apply(v),
        lambda: hp.Hessian(objective, (x, y), partition).apply(v),
        lambda: partition.vector(model),
        lambda: layer_kernels(objective, (x, y), partition, generator=models.seeded(0)),
    ):
        with pytest.raises(
            UserError, match="the parameters have changed since .*make another.*embedding.weight"
        ):
            attempt()


# -- state in plain attributes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STATES)
def test_every_pass_begins_at_the_same_state_and_leaves_it(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(Stateful(kind)).double()
    x, y = torch.randint(0, V, (2, 3, 5), generator=models.seeded(1))
    model(x)
    state: Any = model.body.state
    value = model.body._value().clone() if kind != "generator" else state.get_state()  # type: ignore[operator]
    objective, partition = hp.Objective(model), hp.Partition.of(model, "parameter")
    assert torch.equal(objective.outputs((x, y)), objective.outputs((x, y)))
    g, h = hp.GaussNewton(objective, (x, y), partition), hp.Hessian(objective, (x, y), partition)
    v = torch.randn(1, partition.size, generator=models.seeded(2), dtype=torch.float64)
    assert torch.equal(g.apply(v), g.apply(v)) and torch.equal(h.apply(v), h.apply(v))
    layer_kernels(objective, (x, y), partition, generator=models.seeded(0))
    assert model.body.state is state
    assert torch.equal(value, model.body._value() if kind != "generator" else state.get_state())  # type: ignore[operator]


def test_what_cannot_be_put_back_is_named() -> None:
    class Iterating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.numbers = nn.Linear(D, D), (float(i) for i in range(1000))

        def forward(self, h: Tensor) -> Tensor:
            return self.linear(h) * next(self.numbers)

    model = Net(Iterating()).double()
    x, y = torch.randint(0, V, (2, 3, 5), generator=models.seeded(1))
    with pytest.raises(UserError, match=r"body\.numbers.*cannot be put back"):
        hp.Objective(model).loss((x, y))


def test_a_tensor_too_large_to_copy_is_noticed_when_it_is_written_to() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.zeros(100))
    state = ModuleState(model, copied=100)
    assert not state.restore()
    model.table.add_(1)  # type: ignore[operator]
    assert state.restore() == ["table"]
