"""A recorder in a loop whose parameters FSDP2 shards: the rows of one process that holds them whole, training untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hessprobe.any_loop.recorder import Recorder
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.store.reader import open_run
from tests.models import redraw, seeded
from tests.processes import on_processes

pytestmark = pytest.mark.processes


STEPS = 3
PROBE = {"cross_layer": {"sequences": 8, "rounds": 2}}
KERNELS = (
    "fro2",
    "fro2_stderr",
    "coupling",
    "coupling_stderr",
    "kernel",
    "off_block_energy",
    "jacobi_radius",
    "loss",
)


def decoder() -> nn.Module:
    config = DecoderConfig(layers=2, width=4, feedforward=6, heads=2, vocabulary=6, context=8)
    return redraw(Decoder(config, generator=seeded(0)), seeded(1))


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Returns one process's batch; each has more sequences than it brings to a row."""
    x, y = torch.randint(6, (2, 5 + rank, 4), generator=seeded(10 * step + rank))
    return x, y


def trained(processes: Processes, folder: Path | None) -> list[Tensor]:
    """Returns this process's shards after a few steps, recorded or not."""
    mesh = init_device_mesh("cpu", (processes.count,))
    model = decoder()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    whole = decoder()  # what one process would measure, at the same weights
    recorder = alone = None
    if folder is not None:
        recorder = Recorder(folder / "sharded", model, PROBE, every=1, optimizer=optimizer)
        alone = Recorder(folder / f"alone-{processes.rank}", whole, PROBE, every=1, processes=ALONE)
    for step in range(STEPS):
        x, y = batch_of(step, processes.rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        if recorder is not None and alone is not None:
            (found,) = recorder(step, (x, y))
            assert not found.failure, found.failure
            with torch.no_grad():
                for mine, shard in zip(whole.parameters(), model.parameters(), strict=True):
                    mine.copy_(shard.full_tensor())
            first = [batch_of(step, rank) for rank in range(processes.count)]
            each = 8 // processes.count
            alone._measuring.forget()  # at the weights after the step, as the sharded row is
            (wanted,) = alone(step, [(x[:each], y[:each]) for x, y in first])
            assert not wanted.failure, wanted.failure
    if recorder is not None and alone is not None:
        recorder.close()
        alone.close()
    return [p.detach().to_local().clone() for p in model.parameters()]


def recorded(processes: Processes, folder: Path) -> None:
    for mine, without in zip(trained(processes, folder), trained(processes, None), strict=True):
        assert torch.equal(mine, without)


def test_rows_of_sharded_parameters_are_those_of_whole_ones(tmp_path: Path):
    on_processes(2, recorded, tmp_path)
    found, wanted = (open_run(tmp_path / name)["cross_layer"].to_dataset() for name in ("sharded", "alone-0"))
    assert found.sizes["step"] == STEPS
    for name in KERNELS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert bool(found["step_curvature"].isnull().all()) and bool(found["symmetry_gap"].isnull().all())
    assert found["tokens"].equals(wanted["tokens"])
