"""Training by several processes: the tables of one, one voice, and an end for all when one ends.

Sums that are added up in other parts round otherwise. The runs compared are in float64 (see in_double), where that is
1e-15, and a row must agree to 1e-9 of its largest number, or of that number's error: no processor's rounding decides.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.training.runs import CLOCK, attributes, parameters, tables, text_file, tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Odd numbers of sequences: shares are ragged.
SMALL = (
    "optimizer.sequences=5", "data.held_out_sequences=7", "cross_layer.sequences=7", "gn_hessian.every=2",
    "gn_hessian.sequences=5", "gn_hessian.samples=2", "gn_hessian.lanczos_steps=3", "gn_hessian.cg_iterations=3",
    "preconditioner.every=2", "preconditioner.curvature_sequences=[5]", "preconditioner.held_out_sequences=7",
    "preconditioner.folds=3", "preconditioner.dampings=[0.1]", "preconditioner.cg_iterations=3",
    'preconditioner.candidates=["gradient","update","adam","shampoo","kfac","diagonal_gn","full_gn"]',
)  # fmt: skip
MEASURED, ONE_PROBE = "--probe=cross_layer,gn_hessian,preconditioner", "--probe=cross_layer"
ROUNDING = ("symmetry_gap",)  # nothing but rounding

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL; this system has neither"),
]


class Launcher:
    """Starts commands in several processes; see torchrun_child."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.flags = [*(f"--set={setting}" for setting in (*tiny(text_file(folder)), *SMALL)), "--steps=3"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.torchrun_child"], cwd=ROOT, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, count: int, *words: str, fault: str = "") -> list[int]:
        """Starts a command in so many processes; returns their pids."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.number += 1
        self.said = self.folder / f"said-{self.number}"
        self.process.stdin.write("\t".join([str(count), fault, str(self.said), *words]) + "\n")
        self.process.stdin.flush()
        return [int(pid) for pid in self.process.stdout.readline().split()]

    def ended(self) -> tuple[list[int], str]:
        """Waits for all; returns how each ended, and what they said."""
        assert self.process.stdout is not None
        return [int(status) for status in self.process.stdout.readline().split()], self.said.read_text()

    def run(self, count: int, *words: str, fault: str = "") -> tuple[list[int], str]:
        self.start(count, *words, fault=fault)
        return self.ended()

    def train(self, count: int, out: Path, *words: str, fault: str = "") -> tuple[list[int], str]:
        return self.run(count, "train", f"--out={out}", *self.flags, *words, fault=fault)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    found = Launcher(tmp_path_factory.mktemp("processes"))
    yield found
    found.process.communicate()


@pytest.fixture(scope="module")
def alone(launcher: Launcher) -> Path:
    """Returns the folder of the run that one process made."""
    out = launcher.folder / "alone"
    status, said = launcher.train(1, out, MEASURED)
    assert status == [0], said
    return out


def apart(one: xr.Dataset, other: xr.Dataset, name: str, row: int) -> float:
    """Returns how far a row's numbers are from another's, relative to the largest of them or of their errors."""
    x, y = (np.asarray(table[name].values[row], dtype=float) for table in (one, other))
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y), name)
    with_errors = [name, f"{name}_stderr", name.removesuffix("_stderr")]
    held = np.concatenate([one[n].values[row].ravel() for n in with_errors if n in one])
    held = held[np.isfinite(held)]
    gap = np.abs(x - y)[np.isfinite(x)]
    return float(gap.max() / np.abs(held).max()) if gap.any() else 0.0


def assert_same_tables(found: Path, wanted: Path) -> None:
    one, other = tables(wanted), tables(found)
    assert set(one) == set(other) == {"train", "cross_layer", "gn_hessian", "preconditioner"}
    compared = 0
    for table, rows in one.items():
        assert rows.step.equals(other[table].step) and not any(other[table].failure.values)
        for name in {str(name) for name in rows.data_vars} - {*CLOCK, *ROUNDING}:
            if rows[name].dtype.kind != "f":
                np.testing.assert_array_equal(rows[name].values, other[table][name].values, name)
                continue
            for row, step in enumerate(rows.step.values):
                gap = apart(rows, other[table], name, row)
                limit = 1e-6 if rows[name].dtype == np.float32 else 1e-9  # what is stored in float32
                assert gap <= limit, f"{table}: {name} at step {step}: {gap:.1e}"
                compared += 1
    assert compared > 100
    assert distance(found, wanted) < 1e-9


def distance(one: Path, other: Path) -> float:
    """Returns how far two runs' weights are apart, relative to the weights."""
    theta, wanted = parameters(one), parameters(other)
    return float((theta - wanted).norm() / wanted.norm())


def test_torchrun_with_two_processes_gives_the_tables_of_one(launcher, alone, tmp_path):
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "tests.training.in_double",
        "train",
        MEASURED,
    ]
    done = subprocess.run(
        [sys.executable, *words, f"--out={tmp_path / 'two'}", *launcher.flags],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("next ") == 1 and done.stderr.count("held-out") == 3 + 2
    )  # steps, and efficiencies
    assert_same_tables(tmp_path / "two", alone)
    assert (attributes(tmp_path / "two")["processes"], attributes(alone)["processes"]) == (2, 1)


def test_four_processes_give_the_tables_of_one(launcher, alone, tmp_path):
    status, said = launcher.train(4, tmp_path / "four", MEASURED)
    assert status == [0] * 4, said
    assert_same_tables(tmp_path / "four", alone)


@pytest.mark.parametrize(
    "setting", ["optimizer.sequences=3", "cross_layer.sequences=3", "data.held_out_sequences=3"]
)
def test_fewer_sequences_than_processes_are_refused_once_before_anything_is_written(
    launcher, setting, tmp_path
):
    status, said = launcher.train(4, tmp_path / "run", ONE_PROBE, f"--set={setting}")
    assert status == [2, 0, 0, 0]
    assert said.count("error:") == 1 and "Traceback" not in said
    name, given = setting.split("=")
    assert f"{name} = {given}: wanted at least 4" in said and "--nproc-per-node" in said
    assert not (tmp_path / "run").exists()


def test_what_one_does_wrong_is_said_once(launcher, alone):
    status, said = launcher.train(2, alone)
    assert status == [2, 0] and said.count("holds a run already") == 1 == len(said.splitlines())
    status, said = launcher.train(2, launcher.folder / "no", "--optimizer=sgd")
    assert status == [2, 0] and said.count("no optimizer named 'sgd'") == 1 == len(said.splitlines())
    status, said = launcher.train(2, launcher.folder / "no", "--device=cuda:3")
    assert status == [2, 0] and "--device cuda:3: 2 processes take a device each" in said
    status, said = launcher.run(2, "train", "--prob", "cross_layer")
    assert status[0] == 2 and said.count("No such option") == 1, said
    status, said = launcher.run(2, "show", str(alone))
    assert status[0] == 2
    assert said == "error: hessprobe show runs in one process: call it without torchrun\n"
    assert not (launcher.folder / "no").exists()


def test_a_dry_run_prints_its_plan_once(launcher, tmp_path):
    status, said = launcher.train(2, tmp_path / "run", "--dry-run")
    assert status == [0, 0] and said.count("block.0") == 1, said
    assert not (tmp_path / "run").exists()


def test_a_row_that_one_process_cannot_measure_fails_in_all_and_training_goes_on(launcher, alone, tmp_path):
    status, said = launcher.train(2, tmp_path / "run", ONE_PROBE, fault="measuring")
    assert status == [0, 0], said
    reason = "process 1: MemoryError: no room for the second row"
    assert tables(tmp_path / "run")["cross_layer"].failure.values.tolist() == ["", reason]
    assert said.count(reason) == 1
    assert distance(tmp_path / "run", alone) < 1e-6


def test_processes_whose_parameters_drift_apart_are_brought_together(launcher, alone, tmp_path):
    """The first one's are everyone's: its weights are those of a run in which no process rounds otherwise."""
    for folder, fault in (("exact", ""), ("drifting", "rounding")):
        status, said = launcher.train(2, tmp_path / folder, fault=fault)
        assert status == [0, 0], said
    assert torch.equal(parameters(tmp_path / "exact"), parameters(tmp_path / "drifting"))


def test_an_error_in_one_process_ends_all_with_a_line(launcher, tmp_path):
    status, said = launcher.train(2, tmp_path / "run", "--optimizer=adamw", fault="a mistake")
    assert status == [1, 1]
    line = "failed: process 1: ZeroDivisionError: a mistake of ours; what was logged is kept; go on with --resume"
    assert said.count(line) == 1 and said.count("Traceback") == 1  # that of the process it happened in
    assert tables(tmp_path / "run")["train"].step.values.tolist() == [0, 1]


def test_a_full_disk_is_said_once(launcher, tmp_path):
    status, said = launcher.train(2, tmp_path / "run", "--optimizer=adamw", fault="the disk")
    assert status == [2, 1] and said.count("error: no space left on disk") == 1 and "Traceback" not in said, (
        said
    )


def recorded(out: Path) -> int:
    """Returns how many rows of the training table there are; -1 before there is a log."""
    if not (out / "log.zarr" / "train" / "zarr.json").exists():
        return -1
    return tables(out)["train"].sizes["step"]


def until(happened: Callable[[], bool], launcher: Launcher) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < deadline, launcher.said.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(("killed", "rows", "resumed"), [(1, 2, 3), (0, 1, 1), (0, 0, 2)])
def test_a_killed_process_ends_all_and_resume_ends_in_the_undisturbed_weights(
    launcher, alone, killed, rows, resumed, tmp_path
):
    out = tmp_path / "run"
    pids = launcher.start(2, "train", f"--out={out}", ONE_PROBE, *launcher.flags)
    until(lambda: recorded(out) >= rows, launcher)
    os.kill(pids[killed], signal.SIGKILL)
    status, said = launcher.ended()
    assert status[killed] == -signal.SIGKILL and status[1 - killed] == 1, said
    lines = [line for line in said.splitlines() if line.startswith("failed:")]
    assert len(lines) == 1 and "go on with --resume" in lines[0] and "Traceback" not in said, said
    assert f"process {1 - killed} of 2" in lines[0]
    status, said = launcher.train(resumed, out, ONE_PROBE, "--resume")
    assert status == [0] * resumed, said
    assert tables(out)["train"].step.values.tolist() == [0, 1, 2]
    assert distance(out, alone) < 1e-6


def test_sigterm_ends_a_process_that_waits_for_one_that_hangs(launcher, tmp_path):
    """No handler of Python's runs while a library waits; what was logged is kept, and said to be."""
    words = ["train", f"--out={tmp_path / 'run'}", "--optimizer=adamw", *launcher.flags]
    first, hanging = launcher.start(2, *words, fault="hanging")
    until(lambda: recorded(tmp_path / "run") == 2, launcher)
    time.sleep(0.2)
    os.kill(first, signal.SIGTERM)
    until(lambda: "failed:" in launcher.said.read_text(), launcher)
    os.kill(hanging, signal.SIGKILL)
    status, said = launcher.ended()
    assert status == [1, -signal.SIGKILL] and said.splitlines()[-1].startswith(
        "failed: process 0 of 2 was stopped"
    )
    assert recorded(tmp_path / "run") == 2


def test_a_study_is_made_by_several_processes_too(launcher, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        '[study]\ntarget_loss = 0.1\nseeds = 1\nwarm_up_steps = 1\n[[study.variants]]\nname = "adamw"\n'
        'learning_rates = [0.01, 1e200]\nsettings = { "optimizer.name" = "adamw" }\n'
    )
    words = ["train", str(recipe), *launcher.flags]
    for count, folder in ((1, "one"), (2, "two")):
        status, said = launcher.run(count, *words, f"--out={tmp_path / folder}")
        assert status == [0] * count, said
        assert said.count("of 3") == 3 and said.count("not finite") == 1 and said.count("next ") == 1, said
    runs = [path.parent.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("**/log.zarr")]
    assert len(runs) == 3
    (swept,) = [run for run in runs if "learning_rate-0.01" in str(run)]
    assert distance(tmp_path / "two" / swept, tmp_path / "one" / swept) < 1e-6
    status, said = launcher.run(2, *words, f"--out={tmp_path / 'two'}", "--resume")
    assert status == [0, 0] and said.count("before: ") == 2 and said.count("not finite") == 1, said
