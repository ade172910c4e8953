"""A table of unknown length grows by whole blocks in one move: cut off anywhere, it is the old one or the new."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.schema.table import GROWTH_ROWS
from hessprobe.store import RunWriter, layout, open_run


def plain(folder: Path) -> xr.Dataset:
    return xr.open_zarr(folder / "log.zarr", group="train", consolidated=False)


@pytest.fixture
def full(folder, sample) -> Path:
    """A run whose table of unknown length has its first block of rows full."""
    with RunWriter.create(folder, {}) as writer:
        writer.add_table(sample.train, None)
        for step in range(GROWTH_ROWS):
            writer.write("train", step, {"loss": step})
    return folder


def test_a_table_of_unknown_length_grows_by_whole_blocks(full):
    lengths = []
    with RunWriter.reopen(full) as writer:
        for step in range(GROWTH_ROWS, 9 * GROWTH_ROWS):
            writer.write("train", step, {"loss": step})
            if step % GROWTH_ROWS == 0:
                lengths.append(plain(full).sizes["step"] // GROWTH_ROWS)
    # A quarter more each time: one block until there are eight of them, then two.
    assert lengths == [2, 3, 4, 5, 6, 7, 8, 10]
    table = plain(full).load()
    assert table.step.values.tolist() == [*range(9 * GROWTH_ROWS), *[-1] * GROWTH_ROWS]
    assert "-1: a row laid out in advance" in table.step.attrs["comment"]
    assert table.recorded.values.sum() == 9 * GROWTH_ROWS
    np.testing.assert_array_equal(open_run(full)["train"]["loss"].values, np.arange(9 * GROWTH_ROWS))
    assert [path.name for path in full.iterdir()] == ["log.zarr"]


def test_what_a_reader_has_open_stays_readable_through_growth(full):
    before, run = plain(full), open_run(full)
    with RunWriter.reopen(full) as writer:
        for step in range(GROWTH_ROWS, 4 * GROWTH_ROWS):
            writer.write("train", step, {"loss": step})
    np.testing.assert_array_equal(before["loss"].values, np.arange(GROWTH_ROWS))
    np.testing.assert_array_equal(run["train"]["loss"].values, np.arange(GROWTH_ROWS))


class Killed(Exception):
    """The process is gone: from here on, none of its operations happens."""


def _die_at(monkeypatch: pytest.MonkeyPatch, operation: int) -> list[str]:
    """Lets the file operations before the given one happen, and none after; returns those that were tried."""
    tried: list[str] = []

    def dying(name, function):
        def call(*args, **kwargs):
            tried.append(name)
            if len(tried) > operation:
                raise Killed(name)
            return function(*args, **kwargs)

        return call

    for name in ("link", "mkdir", "rename", "replace", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))
    monkeypatch.setattr(layout, "_rename_exchange", dying("exchange", layout._rename_exchange))
    return tried


@pytest.mark.parametrize("atomic", [True, False])
def test_a_growth_cut_off_at_any_file_operation_loses_nothing(full, tmp_path, monkeypatch, atomic):
    """`atomic` False: a system that cannot exchange two directories."""
    if not atomic:
        monkeypatch.setattr(layout, "_rename_exchange", lambda first, second: False)

    def cut_off(operation: int) -> tuple[Path, list[str]]:
        folder = tmp_path / f"cut-{operation}"
        shutil.copytree(full, folder)
        writer = RunWriter.reopen(folder)
        with monkeypatch.context() as patch:
            tried = _die_at(patch, operation)
            with suppress(Killed):
                writer.write("train", GROWTH_ROWS, {"loss": GROWTH_ROWS})
        writer._lock.release()
        return folder, tried

    _, operations = cut_off(1000)
    # The many links and folders of the copy are alike: every fourth will do. Renames are each their own case.
    points = [i for i, name in enumerate(operations) if name not in ("link", "mkdir") or i % 4 == 0]
    assert len(points) > 8
    missing = 0
    for operation in points:
        folder, _ = cut_off(operation)
        if (folder / "log.zarr" / "train").exists():
            opened = plain(folder).load()
            assert opened.sizes["step"] in (GROWTH_ROWS, 2 * GROWTH_ROWS)
            assert opened.recorded.values[:GROWTH_ROWS].all()
        else:
            missing += 1
        losses = open_run(folder)["train"].to_dataset()["loss"].values
        np.testing.assert_array_equal(losses[:GROWTH_ROWS], np.arange(GROWTH_ROWS))
        with RunWriter.reopen(folder) as writer:
            writer.write("train", GROWTH_ROWS, {"loss": GROWTH_ROWS})
        losses = open_run(folder)["train"].to_dataset()["loss"].values
        np.testing.assert_array_equal(losses, np.arange(GROWTH_ROWS + 1))
    assert missing == (0 if atomic else 1)  # only between two renames is the table away, and it comes back


def test_a_reader_that_restores_a_table_does_not_stop_the_writer(full, monkeypatch):
    """Between the writer's two renames, a reader finds the table missing and puts the old one back."""
    rename, restored = os.rename, []

    def meddled(source, target):
        if Path(source).parent.name == ".log.zarr.building" and not Path(source).name.endswith(".aside"):
            if len(restored) < 2:
                restored.append(source)
                layout.restore(full)
        rename(source, target)

    monkeypatch.setattr(layout, "_rename_exchange", lambda first, second: False)
    with RunWriter.reopen(full) as writer:
        monkeypatch.setattr(os, "rename", meddled)
        writer.write("train", GROWTH_ROWS, {"loss": GROWTH_ROWS})
    assert len(restored) == 2
    np.testing.assert_array_equal(open_run(full)["train"]["loss"].values, np.arange(GROWTH_ROWS + 1))


def test_growth_copies_where_the_file_system_has_no_links(full, monkeypatch):
    def refused(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with RunWriter.reopen(full) as writer:
        for step in range(GROWTH_ROWS, 2 * GROWTH_ROWS):
            writer.write("train", step, {"loss": step})
    np.testing.assert_array_equal(open_run(full)["train"]["loss"].values, np.arange(2 * GROWTH_ROWS))


def test_a_disk_full_while_growing_keeps_every_row(full, monkeypatch):
    def no_space(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunWriter.reopen(full) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", no_space)
            with pytest.raises(UserError, match=f"no space left .* the {GROWTH_ROWS} rows recorded before"):
                writer.write("train", GROWTH_ROWS, {"loss": 0.0})
        assert plain(full).sizes["step"] == GROWTH_ROWS
        writer.write("train", GROWTH_ROWS, {"loss": GROWTH_ROWS})
    np.testing.assert_array_equal(open_run(full)["train"]["loss"].values, np.arange(GROWTH_ROWS + 1))


def test_the_files_of_a_long_run_stay_few(folder, sample):
    with RunWriter.create(folder, {}) as writer:
        writer.add_table(sample.train, range(10_000))
        for step in range(0, 10_000, 512):
            writer.write("train", step, {"loss": step})
    # loss, recorded and the step labels: 20 chunks each of 512 rows, beside five descriptions.
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3 * 20 + 6
