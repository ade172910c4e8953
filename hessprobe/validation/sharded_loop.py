"""A loop under fully_shard for torchrun, recorded and not: DEVICE OUT.json FOLDER, see validation/stages/processes.py."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hessprobe.any_loop.recorder import Recorder
from hessprobe.machine.processes import ALONE
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.validation.modes import prepare
from hessprobe.validation.rows import compared

STEPS = 3
PROBE = {"cross_layer": {"sequences": 8, "rounds": 2}}
COMPARED = ("fro2", "coupling", "off_block_energy", "kernel", "loss")


def main() -> None:
    """Trains twice, and writes what was the same."""
    prepare()
    device, out, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(0)
    # Words between processes go over gloo on GPUs too, as in hessprobe's own runs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)
    bare, _, _ = trained(device, None)
    probed, rows, gaps = trained(device, folder)
    found = {
        "backend": backend,
        "same": all(torch.equal(a, b) for a, b in zip(bare, probed, strict=True)),
        "failures": [row.failure for row in rows if row.failure],
        "seconds": min((row.seconds for row in rows), default=math.nan),
        "gaps": gaps,
    }
    out.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def decoder(device: str) -> Decoder:
    """Returns a small decoder at its initial weights."""
    config = DecoderConfig(layers=2, width=32, feedforward=64, heads=2, vocabulary=64, context=32)
    return Decoder(config, generator=torch.Generator().manual_seed(0)).to(device)


def trained(device: str, folder: Path | None) -> tuple[list[Tensor], list[Any], dict[str, float]]:
    """Returns the weights after a few steps, the rows, and their largest differences from a whole model's."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model, whole = decoder(device), decoder(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = None
    if folder is not None:
        recorder = Recorder(folder, model, PROBE, every=1, optimizer=optimizer)
    rows: list[Any] = []
    gaps: dict[str, float] = {}
    for step in range(STEPS):
        tokens = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(step)).to(device)
        batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()
        if recorder is None or folder is None:
            continue
        (row,) = recorder(step, batch)
        rows.append(row)
        with torch.no_grad():
            for mine, shard in zip(whole.parameters(), model.parameters(), strict=True):
                mine.copy_(full(shard))
        # The sharded row is measured at the weights after the step: so is this one, of a recorder made there.
        with Recorder(
            folder.with_name(f"whole-{step}"), whole, PROBE, every=[step], first_step=step, processes=ALONE
        ) as alone:
            (wanted,) = alone(step, batch)
        if row.row is not None and wanted.row is not None:
            apart = compared(row.row, wanted.row)
            for name in COMPARED:
                gaps[name] = max(gaps.get(name, 0.0), apart.get(name, math.inf))
    if recorder is not None:
        recorder.close()
    return [full(p).detach().cpu().clone() for p in model.parameters()], rows, gaps


def full(p: nn.Parameter) -> Tensor:
    """Returns a sharded parameter whole."""
    gather = getattr(p, "full_tensor", None)
    return p if gather is None else gather()


if __name__ == "__main__":
    main()
