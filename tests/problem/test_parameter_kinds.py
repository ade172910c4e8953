"""Parameters of every kind are measured exactly, in float32 at least, or refused by name with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import hessprobe as hp
from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.problem.measuring import measuring
from tests import models, oracles
from tests.problem.stateful_models import D, Net, V


def batch() -> tuple[Tensor, Tensor]:
    x, y = torch.randint(0, V, (2, 4, 5), generator=models.seeded(1))
    return x, y


class Adapted(nn.Module):
    """A low-rank adapter in one precision on a base in another, as adapters are written: cast to and fro."""

    def __init__(self, base: torch.dtype, adapter: torch.dtype) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(D, D).to(base).requires_grad_(False), nn.Linear(D, 2).to(adapter)
        self.up = nn.Linear(2, D).to(adapter)

    def forward(self, h: Tensor) -> Tensor:
        found = self.base(h)
        return found + self.up(self.down(h.to(self.down.weight.dtype))).to(found.dtype)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_frozen_base_in_half_precision_is_measured_in_that_of_the_rest(
    tmp_path: Path, adapter: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Net(Adapted(torch.bfloat16, adapter))
    for part in (model.embedding, model.head):
        part.to(torch.bfloat16).requires_grad_(False)
    before = {name: (id(p), p.dtype, p.detach().clone()) for name, p in model.named_parameters()}
    exact = Net(Adapted(torch.float64, torch.float64)).double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    for part in (exact.embedding, exact.head):
        part.requires_grad_(False)
    partition = hp.Partition.of(model, "parameter")
    theta = partition.vector(model).float()
    found = hp.GaussNewton(hp.Objective(model), batch(), partition, parameters=theta).to_dense()
    truth = hp.GaussNewton(hp.Objective(exact), batch(), partition).to_dense()
    assert found.dtype == torch.float32 and oracles.relative_error(found.double(), truth) < 1e-5
    with hp.Recorder(
        tmp_path / "run", model, probes=["cross_layer"], every=1, partition=partition
    ) as recorder:
        assert [row.failure for row in recorder(0, batch())] == [""]
    for name, p in model.named_parameters():
        assert (id(p), p.dtype) == before[name][:2] and torch.equal(p, before[name][2])


def test_trainable_parameters_of_two_precisions_are_measured_in_the_higher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(nn.Linear(D, D))
    model.embedding.to(torch.bfloat16)
    partition = hp.Partition.of(model, "parameter")
    found = hp.GaussNewton(hp.Objective(model), batch(), partition)
    exact = Net(nn.Linear(D, D)).double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    truth = hp.GaussNewton(hp.Objective(exact), batch(), partition).to_dense()
    assert found.dtype == torch.float32 and oracles.relative_error(found.to_dense().double(), truth) < 1e-5


@pytest.fixture
def accelerator_anew() -> Iterator[None]:
    """Lets a test make an accelerator of its own kind, though accelerate keeps one for a whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("accelerator_anew")
def test_autocast_that_the_model_switches_on_itself_stays_off() -> None:
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Linear(D, D), nn.GELU()))
    truth = hp.GaussNewton(hp.Objective(model), batch(), hp.Partition.of(model, "parameter")).to_dense()
    wrapped = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    seen: list[torch.dtype] = []
    wrapped.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wrapped(batch()[0])
    assert seen == [torch.bfloat16]
    seen.clear()
    objective, partition = hp.Objective(wrapped), hp.Partition.of(wrapped, "parameter")
    assert torch.equal(hp.GaussNewton(objective, batch(), partition).to_dense(), truth)
    objective.gradient(batch(), partition)
    layer_kernels(objective, batch(), partition, generator=models.seeded(0))
    with measuring(wrapped):
        objective.outputs(batch())
    assert set(seen) == {torch.float32}
    seen.clear()
    layer_kernels(objective, batch(), partition, generator=models.seeded(0), autocast=torch.bfloat16)
    assert torch.bfloat16 in seen  # where it is asked for


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.cfloat))

    def forward(self, h: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(h) * self.filter, n=D)


class Packed(Tensor):
    """A tensor class with arithmetic of its own, as quantised weights are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_complex_and_packed_parameters_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"complex parameters: body\.filter.*view_as_complex"):
        hp.Partition.of(Net(Spectral()))
    model = Net(nn.Linear(D, D))
    model.body.weight = nn.Parameter(torch.randn(D, D).as_subclass(Packed), requires_grad=False)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"class Packed: body\.weight.*dequantised"):
        hp.Partition.of(model)


class Dequantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randint(0, 255, (D, D), dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.full((D, 1), 0.01))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ ((self.packed.to(h.dtype) - 128) * self.scale))


def test_integers_beside_trainable_parameters_are_constants() -> None:
    torch.manual_seed(0)
    model = Net(Dequantised()).double()
    partition = hp.Partition.of(model, "parameter")
    assert "body.packed" not in partition.names
    truth = oracles.dense(model, [batch()], "cross_entropy").in_order(partition.names)
    for kind, wanted in ((hp.GaussNewton, truth.gauss_newton), (hp.Hessian, truth.hessian)):
        assert oracles.relative_error(kind(hp.Objective(model), batch(), partition).to_dense(), wanted) < 1e-8


def test_what_runs_without_gradients_counts_zero(tmp_path: Path) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.indexer, self.scorer, self.linear = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
            self.unused = nn.Linear(D, D)

        def forward(self, h: Tensor) -> Tensor:
            with torch.no_grad():
                chosen = self.indexer(h).argmax(-1)
            chosen = chosen + self.scorer(h.detach()).topk(1, -1).indices.squeeze(-1)
            return self.linear(h) * (1 + chosen[..., None])

    torch.manual_seed(0)
    model = Net(Indexed()).double()
    partition = hp.Partition.of(model, "module")
    found = layer_kernels(hp.Objective(model), batch(), partition, generator=models.seeded(0))
    live = {block for block, k in zip(partition.blocks, found.kernel, strict=True) if bool(k.any())}
    assert live == {"embedding", "body.linear", "head"}
