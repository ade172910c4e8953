"""kill -9 at any instant of a run: its log opens, its rows are whole, --resume ends in the uninterrupted weights."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hessprobe.instruments.row_variables import CHECK_VARIABLES
from tests.training.runs import assert_same_rows, state, tables, text_file, tiny

pytestmark = pytest.mark.processes


KILLS, STEPS = 50, 8
# NaN by design: no step is searched for in the warm-up, the loss is held out at every step, and no loss of a user's loop
# is there to be compared.
MAY_BE_NAN = {
    *(variable.name for variable in CHECK_VARIABLES),
    "step_size", "line_search_loss", "predicted_decrease", "actual_decrease", "decrease_ratio", "inner_residual",
}  # fmt: skip


class Trainer:
    """The process that trains on demand."""

    def __init__(self, source: Path) -> None:
        settings = [
            *tiny(source),
            f"training.steps={STEPS}",
            "optimizer.warmup_steps=2",
            "cross_layer.every=3",
        ]
        self.flags = ["--probe=cross_layer", *(f"--set={setting}" for setting in settings)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.contracts.training_child"], cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.pid = 0

    def start(self, folder: Path) -> None:
        """Starts the run, or resumes it where its log exists, as a user would who sees that it does."""
        flags = [*self.flags, "--resume"] if (folder / "log.zarr").exists() else self.flags
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\t".join([str(folder), *flags]) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())

    def ended(self) -> int:
        """Waits for the attempt's end; returns its exit status, or minus the signal that ended it."""
        assert self.process.stdout is not None
        status, self.pid = int(self.process.stdout.readline()), 0
        return status

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    found = Trainer(text_file(tmp_path))
    yield found
    found.close()


def check_rows(folder: Path) -> int:
    """Opens every table with plain xarray; every recorded row is whole. Returns how many there are."""
    rows = 0
    for name, table in tables(folder).items():
        assert (table.failure.values == "").all()
        for variable, values in table.data_vars.items():
            if values.dtype.kind == "f" and variable not in MAY_BE_NAN:
                assert np.isfinite(values.values).all(), f"{name}: {variable}"
        if name == "train":
            # A step is recorded only after all before it, and a resumed run rewrites what it repeats.
            assert table.step.values.tolist() == list(range(table.sizes["step"]))
        rows += table.sizes["step"]
    return rows


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL; this system has neither")
def test_killed_at_any_instant_a_run_resumes_to_the_uninterrupted_weights(tmp_path, trainer):
    whole = tmp_path / "whole"
    trainer.start(whole)
    began = time.perf_counter()
    assert trainer.ended() == 0, whole.with_suffix(".out").read_text()
    duration = time.perf_counter() - began

    # Short enough for several kills a run, long enough to get somewhere between them.
    delays, number, kills, reached = random.Random(5), 0, 0, set()
    while True:
        folder = tmp_path / f"run-{number}"
        trainer.start(folder)
        if kills < KILLS:
            time.sleep(delays.uniform(0.0, 0.7 * duration))
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(trainer.pid, signal.SIGKILL)
        status = trainer.ended()
        assert status in (0, -signal.SIGKILL), folder.with_suffix(".out").read_text()
        if (folder / "log.zarr").exists():
            rows = check_rows(folder)
            reached.add(rows)
        if status != 0:
            kills += 1
            continue
        finished = state(folder)
        assert torch.equal(finished["parameters"], state(whole)["parameters"])
        assert finished["step"] == STEPS
        assert_same_rows(folder, whole)
        if kills >= KILLS:
            break
        number += 1
    assert len(reached) >= 4, f"the kills came at too few places: {sorted(reached)} rows"
