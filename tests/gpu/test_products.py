"""Products on a device are those of plain float64 on the CPU, with TF32 off; and TF32 is put back as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.validation.modes import TF32, deterministic, matmuls
from hessprobe.validation.oracle import Oracle
from hessprobe.validation.problems import odd_problems
from tests.models import seeded
from tests.oracles import dense


@pytest.mark.parametrize("kind", list(odd_problems()))
def test_products_are_those_of_float64(device, kind):
    model, batches = odd_problems()[kind]()
    partition = Partition.of(model)
    v = torch.randn(3, partition.size, generator=seeded(1))
    oracle = Oracle(model, batches, partition)
    own = copy.deepcopy(model).to(device)
    there = [(x.to(device), y.to(device)) for x, y in batches]
    for operator, wanted in ((GaussNewton, oracle.gauss_newton), (Hessian, oracle.hessian)):
        with matmuls("float32"):
            found = operator(Objective(own), there, Partition.of(own)).apply(v.to(device))
        assert found.device.type == device.type
        for row, given in zip(found.cpu().double(), v, strict=True):
            truth = wanted(given)
            assert (row - truth).norm() <= 1e-5 * truth.norm()


def test_the_oracle_itself_is_the_dense_matrices_of_the_definitions():
    model, batches = odd_problems()["ragged batches"]()
    partition = Partition.of(model)
    oracle = Oracle(model, batches, partition)
    truth = dense(copy.deepcopy(model).double(), batches, "cross_entropy").in_order(partition.names)
    v = torch.randn(partition.size, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(oracle.gauss_newton(v), truth.gauss_newton @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(oracle.hessian(v), truth.hessian @ v, rtol=1e-9, atol=1e-12)
    slices = list(partition.slices.values())
    norms = torch.tensor([[truth.gauss_newton[i, j].square().sum() for j in slices] for i in slices])
    torch.testing.assert_close(oracle.block_norms(), norms.double(), rtol=1e-5, atol=1e-12)


def test_switches_are_put_back():
    before = torch.backends.cuda.matmul.fp32_precision
    with matmuls(TF32):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert isinstance(
        torch.backends.cuda.matmul.allow_tf32, bool
    )  # raises after a mix of old and new switches
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
