"""On a device too: kernels are the CPU's, generators give the same draws, a Recorder changes nothing and keeps no memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from hessprobe.any_loop.recorder import Recorder
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.validation.children import ONE_PROCESS, Child
from hessprobe.validation.modes import deterministic
from hessprobe.validation.problems import odd_problems
from hessprobe.validation.rows import compared, row_of
from hessprobe.validation.stages.processes import SHARDED
from hessprobe.validation.timing import bytes_alive, peak_growth
from tests.models import seeded

CONFIG = DecoderConfig(layers=1, width=16, feedforward=32, heads=2, vocabulary=32, context=16)
PROBES = {"cross_layer": {"sequences": 4}, "gn_hessian": {"sequences": 2, "samples": 2, "lanczos_steps": 2}}


@pytest.mark.parametrize("kind", ["decoder", "tied embeddings", "ragged batches"])
def test_kernels_from_a_seed_are_those_of_the_cpu(device, kind):
    """Signs, so that no sampled label can fall on another class; the generator lies on the CPU for both."""
    model, batches = odd_problems()[kind]()

    def drawn(where: torch.device) -> LayerKernels:
        own = copy.deepcopy(model).to(where)
        there = [(x.to(where), y.to(where)) for x, y in batches]
        return layer_kernels(
            Objective(own), there, Partition.of(own), rounds=2, generator=seeded(4), cotangent="sign"
        )

    found, wanted = drawn(device), drawn(torch.device("cpu"))
    assert (found.kernel - wanted.kernel).norm() <= 1e-4 * wanted.kernel.norm()


def test_a_row_is_a_function_of_its_seed_on_every_device(device):
    options = {"sequences": 4, "rounds": 2}
    found, wanted = (
        row_of("cross_layer", options, device),
        row_of("cross_layer", options, torch.device("cpu")),
    )
    assert max(compared(found, wanted).values()) < 1e-2


def trained(device: torch.device, folder=None) -> list[torch.Tensor]:
    model = Decoder(CONFIG, generator=seeded(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = None if folder is None else Recorder(folder, model, PROBES, every=2, optimizer=optimizer)
    for step in range(4):
        x, y = torch.randint(32, (2, 4, 16), generator=seeded(step)).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        for row in recorder(step, (x, y)) if recorder is not None else ():
            assert not row.failure, row.failure
    if recorder is not None:
        recorder.close()
    return [p.detach().cpu() for p in model.parameters()]


def test_under_deterministic_algorithms_rows_are_measured_and_weights_stay_bit_for_bit(device, tmp_path):
    with deterministic():
        bare, probed = trained(device), trained(device, tmp_path / "run")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert all(torch.equal(a, b) for a, b in zip(bare, probed, strict=True))


def test_a_recorder_keeps_no_memory_once_it_is_closed(device, tmp_path):
    trained(device, tmp_path / "first")
    before = bytes_alive(device)
    trained(device, tmp_path / "second")
    parameters = sum(p.nbytes for p in Decoder(CONFIG, generator=seeded(0)).parameters())
    assert bytes_alive(device) - before < parameters


def test_peak_growth_sees_an_allocation(device):
    if device.type == "cpu":
        pytest.importorskip("resource")

    def call() -> None:
        torch.ones(2**24, device=device)  # 64 MiB, let go at once

    assert peak_growth(call, device) > 2**25


def test_a_loop_under_fully_shard_in_one_process(device, tmp_path):
    import json

    out = tmp_path / "found.json"
    child = Child(
        ONE_PROCESS, SHARDED, [device.type, str(out), str(tmp_path / "run")], tmp_path / "sharded.log"
    )
    child.succeeded(180)
    found = json.loads(out.read_text())
    assert found["same"] and not found["failures"] and max(found["gaps"].values()) < 1e-4
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
