"""Probes measure on their schedule; one that fails leaves its reason in its row, and training goes on."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.measure.probe import CrossLayerProbe
from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.machine.devices import peak_memory
from hessprobe.measuring import row_recorder as recorder
from hessprobe.measuring.row_recorder import ProbeRecorder, build_probes, check_symmetry
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import build_recipe
from hessprobe.schema.table import Table
from hessprobe.store.writer import RunWriter
from hessprobe.training.loop import train
from tests import models
from tests.training.runs import recipe, state, tables


class Scripted(Probe):
    """A probe that does as its script says: a number is the loss it reports, an exception is raised."""

    name, every, sequences = "scripted", 2, 1

    def __init__(self, *script: float | Exception) -> None:
        self.script = list(script)

    def table(self, partition: Partition) -> Table:
        return Table(name=self.name, variables=MEASUREMENT_VARIABLES, coordinates={})

    def measure(self, snapshot: Snapshot) -> Row:
        loss = self.script[snapshot.step // self.every]
        if isinstance(loss, Exception):
            raise loss
        row = dict.fromkeys((v.name for v in MEASUREMENT_VARIABLES), 1.0) | {
            "loss": torch.tensor(loss),
            "symmetry_gap": 0.0,
        }
        return {name: value for name, value in row.items() if name not in ("seconds", "peak_memory")}

    def cost(self, partition: Partition) -> float:
        return 0.0


FAILURES = {
    "a user's mistake": (UserError("no token carries a target"), "no token carries a target"),
    "out of memory": (torch.OutOfMemoryError("8 GiB wanted"), "OutOfMemoryError: 8 GiB wanted"),
    "an exception": (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    "not a number": (math.nan, "FloatingPointError: the loss on the probe's batch is nan"),
}


def place_in_tests(function: Any) -> str:
    """Returns where a function raises, as a reason names it."""
    lines, first = inspect.getsourcelines(function)
    line = first + next(i for i, text in enumerate(lines) if "raise " in text)
    return f"{Path(__file__).relative_to(Path.cwd())}:{line}, in {function.__name__}"


def snapshot(step: int) -> Snapshot:
    problem = models.ZOO["mlp_classifier"](models.seeded(0))
    partition = Partition.of(problem.model, "module")
    return Snapshot(
        step=step, objective=Objective(problem.model), partition=partition, update=None, seed=0,
        parameters=partition.vector(problem.model), batches=list(problem.batches),
    )  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_row_carries_its_reason_and_the_next_one_is_measured(tmp_path, failure):
    raised, reason = FAILURES[failure]
    probe = Scripted(2.5, raised, 1.5)
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [probe], snapshot(0).partition, steps=6)
        found = [held.record(probe, snapshot(step)) for step in (0, 2, 4)]
    if type(raised) not in (UserError, float):  # then the place in the code that raised it is named
        reason += f" ({place_in_tests(Scripted.measure)})"
    assert [measurement.failure for measurement in found] == ["", reason, ""]
    assert [measurement.row is None for measurement in found] == [False, True, False]
    table = tables(tmp_path)["scripted"]
    assert table.failure.values.tolist() == ["", reason, ""]
    np.testing.assert_array_equal(table.loss.values, [2.5, np.nan, 1.5])
    assert np.isnan(table.tokens.values[1])


def test_a_run_whose_probe_always_fails_ends_as_if_it_had_none(tmp_path, monkeypatch, capsys):
    def refuse(self: CrossLayerProbe, snapshot: Snapshot) -> Row:
        raise RuntimeError("vmap: no batching rule for [aten::/weird]")  # brackets mean markup to rich

    monkeypatch.setattr(CrossLayerProbe, "measure", refuse)
    settings = ("training.steps=3", "optimizer.name=adamw")
    train(recipe(tmp_path / "run", *settings, 'probes=["cross_layer"]'), tmp_path / "run")
    train(recipe(tmp_path / "bare", *settings), tmp_path / "bare")
    assert torch.equal(state(tmp_path / "run")["parameters"], state(tmp_path / "bare")["parameters"])
    table = tables(tmp_path / "run")["cross_layer"]
    reason = f"RuntimeError: vmap: no batching rule for [aten::/weird] ({place_in_tests(refuse)})"
    assert table.failure.values.tolist() == [reason] * 2
    assert f"{reason} (training goes on)" in capsys.readouterr().err


def test_a_full_disk_is_no_failed_probe(tmp_path, monkeypatch):
    probe = Scripted(2.5)
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [probe], snapshot(0).partition, steps=1)

        def full(*_) -> None:
            raise UserError("no space left on disk")

        monkeypatch.setattr(writer, "write", full)
        with pytest.raises(UserError, match="no space left"):
            held.record(probe, snapshot(0))


def test_a_probe_is_due_at_0_and_every_so_many_steps_below_the_runs_length(tmp_path):
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [Scripted()], snapshot(0).partition, steps=5)
        assert [step for step in range(8) if held.due(step)] == [0, 2, 4]


def test_a_row_says_what_the_measurement_cost(tmp_path: Path):
    probe = Scripted(2.5)
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [probe], snapshot(0).partition, steps=1)
        held.record(probe, snapshot(0))
    table = tables(tmp_path)["scripted"]
    assert 0 < float(table.seconds[0]) < 60
    assert 2**20 < float(table.peak_memory[0]) < 2**40


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="compares with Linux's own account in /proc"
)
def test_peak_memory_of_a_cpu_run_is_the_processes_high_water_mark_in_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    assert peak_memory(torch.device("cpu")) == pytest.approx(1024 * float(kibibytes), rel=0.05)


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_that_since_the_last_reset():
    device = torch.device("cuda")
    held = torch.ones(2**22, device=device)
    del held
    recorder.reset_peak_memory(device)
    assert peak_memory(device) < 2**24
    held = torch.ones(2**22, device=device)
    assert peak_memory(device) >= held.nbytes


def test_probes_are_built_by_name_each_once_with_their_own_settings():
    settings = ['probes=["cross_layer", "cross_layer"]', "cross_layer.every=7", "cross_layer.sequences=9"]
    (probe,) = build_probes(build_recipe({}, settings))
    assert isinstance(probe, CrossLayerProbe)
    assert (probe.every, probe.sequences) == (7, 9)
    assert build_probes(build_recipe({})) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_that_are_not_symmetric_are_no_row(dtype):
    limit = torch.finfo(dtype).eps ** 0.4
    for gap in (0.0, limit / 2, float("nan")):
        check_symmetry(gap, dtype)
    with pytest.raises(FloatingPointError, match=r"products are not symmetric.*half precision.*pass to pass"):
        check_symmetry(2 * limit, dtype)
