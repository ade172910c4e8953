"""Products, gradients, ladders and slopes over several processes are those of one, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.residual import Residual
from hessprobe.machine.processes import Processes
from hessprobe.optimization.model_ladder import model_ladder
from hessprobe.problem.objective import Objective
from tests.cases import Case
from tests.processes import on_processes

pytestmark = pytest.mark.processes


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-12 * wanted.norm())


def equal_to_one(processes: Processes, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        case = Case.of(name)
        partition, batches = case.partition, case.problem.batches
        shared = Objective(case.problem.model, loss=case.problem.loss, processes=processes)
        v = case.rows(2)
        for kind in (GaussNewton, Hessian, Residual):
            ours, alone = (kind(o, batches, partition) for o in (shared, case.objective))
            wanted = alone.apply(v)
            for operator in (ours, ours.linearised(2**30), ours.linearised(0)):
                assert near(operator.apply(v), wanted), (name, kind)
            assert near(ours.block_diagonal().apply(v), alone.block_diagonal().apply(v))
            column = partition.blocks[-1:]
            assert near(ours.apply(v, columns=column), alone.apply(v, columns=column))
        for found, wanted in zip(
            shared.gradient(batches, partition), case.objective.gradient(batches, partition), strict=True
        ):
            assert near(found, wanted)
        with torch.no_grad():
            assert near(shared.loss(batches), case.objective.loss(batches))
        ours, alone = (
            curvature_along(GaussNewton(o, batches, partition), v, folds=2) for o in (shared, case.objective)
        )
        assert near(ours.slope, alone.slope) and near(ours.curvature, alone.curvature)
        assert torch.equal(ours.tokens, alone.tokens)
        theta = partition.vector(case.problem.model)
        ours, alone = (
            model_ladder(o, batches, partition, v[0], (0.1, 1.0), parameters=theta)
            for o in (shared, case.objective)
        )
        for part in ("tokens", "slope", "curvature", "prox_linear", "loss"):
            assert near(getattr(ours, part), getattr(alone, part))


# 4: more than some of the batches have sequences.
@pytest.mark.parametrize(
    ("count", "names"), [(2, ("decoder", "decoder_tied", "layernorm")), (4, ("decoder_tied", "layernorm"))]
)
def test_products_of_shared_sequences_are_those_of_one_process(
    count: int, names: tuple[str, ...], tmp_path: Path
):
    on_processes(count, equal_to_one, tmp_path, names)
