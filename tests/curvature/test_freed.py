"""An operator leaves nothing behind: when it is gone, so are its graphs, also those that the collector cannot see."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models

MAKE: dict[str, Callable[..., Any]] = {
    "gauss_newton": GaussNewton,
    "gauss_newton, double-backward": lambda *of: GaussNewton(*of, engine="double-backward"),
    "gauss_newton, linearised": lambda *of: GaussNewton(*of).linearised(2**30),
    "gauss_newton, block-diagonal": lambda *of: GaussNewton(*of).block_diagonal(),
    "hessian": Hessian,
    "hessian, reverse-over-reverse": lambda *of: Hessian(*of, engine="reverse-over-reverse"),
}


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MAKE)
def test_products_leave_no_tensor_behind(name, rows):
    problem = models.ZOO["decoder"](
        models.seeded(0)
    )  # its norms and softmax keep their outputs for the way back
    partition = Partition.of(problem.model)
    of = Objective(problem.model), problem.batches, partition
    v = torch.ones(rows, partition.size, dtype=torch.float64)

    def once() -> None:
        MAKE[name](*of).apply(v)

    once()
    before = alive()
    for _ in range(2):
        once()
    assert alive() <= before
