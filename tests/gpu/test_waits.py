"""On a GPU torch itself says where the host waits: products never, a round of kernels as often with more layers."""

from __future__ import annotations

import warnings

import pytest
import torch

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.verification import verified_plan
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import seeded

CUDA = torch.device("cuda")


def waits_on_gpu(call) -> int:
    """Returns how often torch warns that a call waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in said)


def decoder(layers: int) -> tuple[Objective, list[tuple[torch.Tensor, ...]], Partition]:
    config = DecoderConfig(layers=layers, width=32, feedforward=64, heads=2, vocabulary=64, context=16)
    model = Decoder(config, generator=seeded(0)).to(CUDA)
    batches = [tuple(torch.randint(64, (2, 4, 16), generator=seeded(i)).to(CUDA)) for i in range(2)]
    return Objective(model), batches, Partition.of(model)


@pytest.mark.gpu
def test_torch_sees_a_number_read():
    assert waits_on_gpu(lambda: float(torch.ones(1, device=CUDA))) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_products_never_wait(kind, rows):
    objective, batches, partition = decoder(2)
    matrix = kind(objective, batches, partition)
    v = torch.randn(rows, partition.size, generator=seeded(1)).to(CUDA)
    matrix.apply(v)
    assert waits_on_gpu(lambda: matrix.apply(v)) == 0


@pytest.mark.gpu
def test_kernels_wait_as_often_with_more_layers():
    found = []
    for layers in (2, 6):
        objective, batches, partition = decoder(layers)
        plan = verified_plan(objective, batches, partition)

        def call(of=(objective, batches, partition), plan=plan) -> None:
            layer_kernels(*of, rounds=2, plan=plan, generator=seeded(3))

        call()
        found.append(waits_on_gpu(call))
    assert found[0] == found[1] <= 20


@pytest.mark.gpu
def test_what_goes_beyond_a_bound_to_main_memory_comes_back_as_it_was():
    objective, batches, partition = decoder(2)
    plan = verified_plan(objective, batches, partition)

    def kernel(memory: int) -> torch.Tensor:
        of = (objective, batches, partition)
        return layer_kernels(*of, rounds=2, plan=plan, generator=seeded(3), memory=memory).kernel

    free, bound = kernel(2**30), kernel(2**12)
    assert (free - bound).norm() <= 1e-6 * free.norm()
