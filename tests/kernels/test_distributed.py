"""Two processes under DistributedDataParallel: each rank's kernels are those of its own batch, and nothing is synced."""

from __future__ import annotations

import copy
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import redraw, seeded

pytestmark = pytest.mark.processes


SECONDS = 60  # a hang ends the test, however busy the machine; it takes about 8 s


def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LayerKernels:
    """Returns kernels with a verified plan, as any call on a new model."""
    objective, partition = Objective(model), Partition.of(model, "parameter")
    return layer_kernels(objective, batch, partition, rounds=2, generator=seeded(3))


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def on_rank(rank: int, folder: str) -> None:
    """What each process checks; an assertion that fails in it fails the test."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    config = DecoderConfig(layers=1, width=4, feedforward=6, heads=2, vocabulary=6, context=8, tied=True)
    plain = redraw(Decoder(config, generator=seeded(0)), seeded(1))
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    synced: list[int] = []

    def average(state, bucket):  # unannotated: DDP compares annotations with types, and here they are strings
        synced.append(1)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / 2)

    wrapped.register_comm_hook(None, average)
    x, y = torch.randint(6, (2, 3 + rank, 4), generator=seeded(rank))  # another batch, another size
    wanted = measured(plain, (x, y))
    assert wanted.routes["embedding.weight"] == "one sequence at a time"  # the fallback's way too
    for _ in range(2):
        found = measured(wrapped, (x, y))
        assert torch.equal(found.kernel, wanted.kernel) and found.routes == wanted.routes
    with wrapped.no_sync():
        assert torch.equal(measured(wrapped, (x, y)).kernel, wanted.kernel)
    assert not synced and all(p.grad is None for p in wrapped.parameters())

    # In the middle of a training step: accumulated without sync, measured, then synced once.
    with wrapped.no_sync():
        backward(wrapped, (x, y))
    measured(wrapped, (x, y))
    assert not synced
    backward(wrapped, (x, y))
    assert synced
    backward(plain, (x, y))
    for mine, own in zip(gradients(wrapped), gradients(plain), strict=True):
        both = 2 * own
        dist.all_reduce(both)
        torch.testing.assert_close(mine, both / 2)

    # One rank alone may measure: the other does not have to take part.
    calls = len(synced)
    if rank == 0:
        assert torch.equal(measured(wrapped, (x, y)).kernel, wanted.kernel)
    dist.barrier()
    backward(wrapped, (x, y))
    assert len(synced) > calls
    dist.destroy_process_group()


def test_kernels_under_ddp_are_the_unwrapped_models_and_nothing_is_synced(tmp_path: Path):
    context = mp.spawn(on_rank, (str(tmp_path),), nprocs=2, join=False)
    assert context is not None
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, f"still running after {SECONDS} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
