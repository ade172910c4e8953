"""Differences of passes where FSDP2 shards the parameters: the products of whole ones, and training untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.residual import Residual
from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import labels, redraw, seeded
from tests.processes import on_processes

pytestmark = pytest.mark.processes


def decoder(*, tied: bool) -> nn.Module:
    config = DecoderConfig(layers=2, width=4, feedforward=6, heads=2, vocabulary=7, context=8, tied=tied)
    return redraw(Decoder(config, generator=seeded(0)), seeded(1))


def sharded(processes: Processes, *, tied: bool, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    mesh, model = init_device_mesh("cpu", (processes.count,)), decoder(tied=tied)
    given = {} if policy is None else {"mp_policy": policy}
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **given)  # type: ignore[arg-type]
    return fully_shard(model, mesh=mesh, **given)  # type: ignore[arg-type]


def batches_of(count: int) -> list[tuple[Tensor, Tensor]]:
    """Returns ragged micro-batches with targets that are ignored, one for each process."""
    draws = seeded(3)
    shapes = [(2 + i, 6 - i % 3) for i in range(count)]
    return [
        (torch.randint(7, shape, generator=draws), labels(draws, 7, *shape, ignore=0.3)) for shape in shapes
    ]


def state_of(model: nn.Module) -> list[Tensor]:
    found = []
    for p in model.parameters():
        found += [p.detach().to_local().clone(), p.grad.to_local().clone()]  # type: ignore[union-attr, operator]
    return found


def others_agree(
    objective: Objective,
    alone: Objective,
    batches: list[tuple[Tensor, Tensor]],
    partition: Partition,
    v: Tensor,
) -> None:
    """Compares what else is made of products: blocks, slopes and curvatures."""
    many = GaussNewton(objective, batches, partition).linearised(2**20).block_diagonal().apply(v)
    exact = GaussNewton(alone, batches, partition).block_diagonal().apply(v)
    assert float((many - exact).norm() / exact.norm()) < 1e-7
    ours, theirs = (
        curvature_along(GaussNewton(o, batches, partition), v, folds=2) for o in (objective, alone)
    )
    for name in ("slope", "curvature"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert float((one - other).norm() / other.norm()) < 1e-7, name


def products_agree(
    processes: Processes, folder: Path, kinds: tuple[type[ModelOperator], ...], tied: bool
) -> None:
    model, whole = sharded(processes, tied=tied), decoder(tied=tied)
    batches, partition = batches_of(processes.count), Partition.of(whole)
    objective, alone = Objective(model, processes=processes), Objective(whole, processes=ALONE)
    x, y = batches[processes.rank]
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    before, objects = state_of(model), [(id(p), id(p.grad)) for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    model(x)  # leaves the root's parameters gathered, as an evaluation does
    v = torch.randn(1, partition.size, generator=seeded(5), dtype=torch.float64)
    for kind in kinds:
        found = kind(objective, batches, Partition.of(model))
        wanted, operator = kind(alone, batches, partition).apply(v), found
        got = operator.apply(v)
        assert operator.engine == "first-order"
        errors = operator.step_errors
        assert errors is not None and errors.error < 1e-8 and errors.exact is None
        assert float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < 20 * errors.error, kind
        assert all(torch.equal(theirs, got) for theirs in processes.gathered(got))
        assert all(theirs == errors for theirs in processes.gathered(errors))
        within = {"columns": partition.blocks[:1], "rows": partition.blocks[-1:]}
        part = operator.apply(v, **within)
        exact = kind(alone, batches, partition).apply(v, **within)
        assert float((part - exact).norm() / exact.norm()) < 1e-7
    if kinds == (GaussNewton,):
        others_agree(objective, alone, batches, partition, v)
    assert all(torch.equal(now, then) for now, then in zip(state_of(model), before, strict=True))
    assert [(id(p), id(p.grad)) for p in model.parameters()] == objects
    assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize(
    ("count", "kinds", "tied"),
    [(2, (GaussNewton,), True), (2, (Hessian, Residual), True), (3, (GaussNewton,), False)],
)
def test_products_of_sharded_parameters_are_those_of_whole_ones(
    count: int, kinds: tuple[type[ModelOperator], ...], tied: bool, tmp_path: Path
):
    on_processes(count, products_agree, tmp_path, kinds, tied)


def trained(processes: Processes, *, measured: bool) -> list[Tensor]:
    model = sharded(processes, tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = batches_of(processes.count)
    x, y = batches[processes.rank]
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        if measured:
            operator = GaussNewton(Objective(model, processes=processes), batches, Partition.of(model))
            operator.apply(torch.ones(1, operator.size, dtype=torch.float64))
        optimizer.step()
    return [p.detach().to_local().clone() for p in model.parameters()]  # type: ignore[operator]


def training_is_untouched(processes: Processes, folder: Path) -> None:
    runs = [trained(processes, measured=measured) for measured in (True, False)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_training_goes_on_bit_for_bit(tmp_path: Path):
    on_processes(2, training_is_untouched, tmp_path)


def refused_by_name(processes: Processes, folder: Path) -> None:
    batches = batches_of(processes.count)
    half = sharded(processes, tied=False, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (half, {}, "bfloat16.*mp_policy.*hessprobe probe"),
        (sharded(processes, tied=False), {"engine": "exact"}, "sharded.*first-order"),
        (sharded(processes, tied=False), {"parameters": 0.0}, "leave out parameters="),
    ]
    for model, options, words in cases:
        partition = Partition.of(model)
        if "parameters" in options:
            options = {"parameters": torch.zeros(partition.size, dtype=torch.float64)}
        with pytest.raises(UserError, match=words):
            operator = GaussNewton(Objective(model, processes=processes), batches, partition, **options)  # type: ignore[arg-type]
            operator.apply(torch.ones(1, operator.size, dtype=torch.float64))


def test_what_cannot_be_measured_is_refused_by_name(tmp_path: Path):
    on_processes(2, refused_by_name, tmp_path)
