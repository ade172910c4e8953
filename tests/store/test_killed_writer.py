"""kill -9 at any instant: the log opens in plain xarray, marked rows are whole, and the next process goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.store import open_run
from tests.store import writing_child

pytestmark = pytest.mark.processes


KILLS = 56
KILLS_A_RUN = 4
ROWS = 10  # that a writer adds at most before it is killed: a busy machine stretches the clock, not this
SECONDS = 60  # a writer that adds none for so long hangs


def acknowledged_rows(folder: Path) -> int:
    """Returns how many rows the run's writers have finished, in either table."""
    return int(folder.with_suffix(".acknowledged").read_text() or 0)


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < end, f"nothing for {SECONDS} s"
        time.sleep(0.0005)


def check_whole(recorded: xr.Dataset) -> None:
    """Every row is the row of its step, to the bit."""
    recorded = recorded.load()
    for index, step in enumerate(recorded.step.values.tolist()):
        if writing_child.fails(step):
            assert recorded.failure.values[index] == f"planned at {step}"
            assert np.isnan(recorded["kernel"].values[index]).all()
            continue
        assert recorded.failure.values[index] == ""
        for name, value in writing_child.row(step).items():
            np.testing.assert_array_equal(recorded[name].values[index], value)


def check_killed(folder: Path, acknowledged: int) -> int:
    """Opens every table with plain xarray; returns how many rows are recorded."""
    rows = 0
    for name in ("fixed", "growing"):
        # The first rounds may die before a table is laid out; after its first row it must be there.
        if acknowledged == 0 and not (folder / "log.zarr" / name).exists():
            continue
        table = xr.open_zarr(folder / "log.zarr", group=name, consolidated=False)
        table = table.isel(step=table.recorded.values)
        check_whole(table)
        # The row in hand is the only one that may be missing, also when it was being written anew.
        lost = set(range(acknowledged)) - set(table.step.values.tolist())
        assert len(lost) <= 1, lost
        assert len(set(table.step.values.tolist())) == table.sizes["step"]
        rows += table.sizes["step"]
    return rows


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL; this system has neither")
def test_killed_at_any_instant_the_log_opens_and_goes_on(tmp_path):
    draws = random.Random(20)
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.store.writing_child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    rows, grown, pid = {}, 0, 0
    try:
        for kill in range(KILLS):
            folder = tmp_path / f"run-{kill // KILLS_A_RUN}"
            child.stdin.write(f"{folder}\n")
            child.stdin.flush()
            pid = int(child.stdout.readline())
            growth = folder / ".log.zarr.building" / "growing" / "zarr.json"
            if kill % KILLS_A_RUN == 2:
                wait_for(growth.exists)
            else:
                wanted = acknowledged_rows(folder) + draws.randrange(ROWS)
                wait_for(lambda folder=folder, wanted=wanted: acknowledged_rows(folder) >= wanted)
            time.sleep(draws.uniform(0.0, 0.01))  # anywhere in a row, in making a table, in opening a run
            if (folder / "log.zarr").exists() and kill % 4 == 0:
                for table in open_run(folder).children.values():  # while it is being written
                    check_whole(table.to_dataset())
            os.kill(pid, signal.SIGKILL)
            pid = 0
            assert child.stdout.readline() == "ended\n"
            grown += growth.exists()
            rows[folder] = check_killed(folder, acknowledged_rows(folder))
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
        child.communicate()
    assert sum(rows.values()) > KILLS, "the children hardly wrote: the test shows nothing"
    assert grown, "no kill came after a growth had begun: the test shows nothing about growing"
