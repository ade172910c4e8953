"""A row is recorded whole or not at all, whatever goes wrong; a resumed run continues where the log stands."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import xarray as xr
import zarr.core.sync
from zarr.storage import LocalStore

from hessprobe.errors import UserError
from hessprobe.store import RunWriter, Table, Variable, open_run, rows
from hessprobe.store.rows import RowStore


def whole(folder, sample) -> list[int]:
    """The recorded steps by plain xarray, after checking that each such row is what it should be."""
    table = xr.open_zarr(folder / "log.zarr", group="cross_layer", consolidated=False).load()
    table = table.isel(step=table.recorded.values)
    for step in table.step.values.tolist():
        for name, value in sample.row(step).items():
            np.testing.assert_array_equal(table[name].sel(step=step).values, value)
    return table.step.values.tolist()


def test_a_folder_with_a_run_is_left_alone(recorded):
    before = sorted(path for path in recorded.rglob("*"))
    with pytest.raises(UserError, match="already holds a run; continue it with --resume, or give another"):
        RunWriter.create(recorded, {})
    assert sorted(path for path in recorded.rglob("*")) == before


def test_a_run_may_be_made_beside_other_files(folder):
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    RunWriter.create(folder, {}).close()
    assert sorted(path.name for path in folder.iterdir()) == ["log.zarr", "recipe.toml"]


def test_a_place_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write a run to .*nothing was recorded"):
        RunWriter.create(tmp_path / "file" / "a", {})


def test_reopening_what_is_no_run_is_a_line(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        RunWriter.reopen(tmp_path / "a")


def test_a_mistaken_row_is_refused_and_nothing_changes(recorded, sample):
    row = sample.row(20)
    with RunWriter.reopen(recorded) as writer:
        cases = [
            ("other", 20, row, "no table 'other' .* it has: cross_layer"),
            ("cross_layer", 21, row, "step 21 is not among the 6 steps"),
            ("cross_layer", 20, {**row, "los": 1}, r"unknown \['los'\]"),
            ("cross_layer", 20, {"loss": 1}, r"missing \['count', 'coupling', 'note'\]"),
            ("cross_layer", 20, {**row, "coupling": np.ones(3)}, r"has shape \(3, 3\), got \(3,\)"),
        ]
        for table, step, values, says in cases:
            with pytest.raises(ValueError, match=says):
                writer.write(table, step, values)
        with pytest.raises(ValueError, match="distinct"):
            writer.add_table(sample.train, [1, 1])
    with pytest.raises(ValueError, match="closed"):
        writer.write("cross_layer", 20, row)
    assert open_run(recorded)["cross_layer"].step.values.tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize("steps", [range(300), None])
def test_a_resumed_run_rewrites_rows_and_goes_on(folder, sample, steps):
    with RunWriter.create(folder, {"name": "a"}) as writer:
        writer.add_table(sample.table, steps)
        for step in range(100):
            writer.write("cross_layer", step, {**sample.row(step), "loss": -1.0})
        writer.fail("cross_layer", 100, "out of memory")
    with RunWriter.reopen(folder) as writer:
        writer.add_table(sample.table, steps)
        assert writer.recorded_steps("cross_layer") == list(range(101))
        for step in range(90, 140):
            writer.write("cross_layer", step, sample.row(step))
    table = open_run(folder)["cross_layer"].to_dataset().load()
    assert table.step.values.tolist() == list(range(140))
    assert (table["loss"].values[:90] == -1).all()
    np.testing.assert_array_equal(table["loss"].values[90:], [sample.row(s)["loss"] for s in range(90, 140)])
    assert set(table.failure.values.tolist()) == {""}


def test_a_resumed_run_may_have_more_steps(recorded, sample):
    with RunWriter.reopen(recorded) as writer:
        writer.add_table(sample.table, range(0, 50, 5))
        writer.write("cross_layer", 45, sample.row(45))
    assert open_run(recorded)["cross_layer"].step.values.tolist() == [0, 5, 10, 15, 45]
    plain = xr.open_zarr(recorded / "log.zarr", group="cross_layer", consolidated=False)
    assert plain.step.values.tolist() == list(range(0, 50, 5))


def test_a_resumed_run_must_be_the_same(recorded, sample):
    changed = Variable(
        name="count", dims=("step",), units="tokens", long_name="", estimator="exact", dtype="float64"
    )
    variables = (*sample.table.variables[:2], changed, sample.train.variables[0])[:3]
    other_blocks = {
        "block": ["embedding", "block.1", "head"],
        "other_block": ["embedding", "block.0", "head"],
    }
    with RunWriter.reopen(recorded) as writer:
        with pytest.raises(UserError, match="laid out for other steps .*6 from 0 to 25 there, 3 from 1 to 3"):
            writer.add_table(sample.table, [1, 2, 3])
        with pytest.raises(UserError, match="laid out for other steps"):
            writer.add_table(sample.table, None)
        with pytest.raises(UserError, match="recorded differently .*it also has note; count: .*int64"):
            writer.add_table(Table(name="cross_layer", variables=variables, coordinates=other_blocks), [0])
        with pytest.raises(UserError, match="block: embedding, block.0, head there, embedding, block.1"):
            same = sample.table.variables
            writer.add_table(Table(name="cross_layer", variables=same, coordinates=other_blocks), [0])


@pytest.mark.parametrize("steps", [range(10), None])
def test_a_full_disk_is_a_line_and_loses_the_row_in_hand_only(folder, sample, steps, monkeypatch):
    """The disk fills at each of the writes of a row in turn, the one of its mark included."""
    writer = RunWriter.create(folder, {})
    writer.add_table(sample.table, steps)
    writer.write("cross_layer", 0, sample.row(0))
    original, left = RowStore.set, 0

    async def full(self, key, value):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        await original(self, key, value)

    monkeypatch.setattr(RowStore, "set", full)
    for step, written in enumerate(range(4 if steps else 5), start=1):
        left = written
        with pytest.raises(UserError) as error:
            writer.write("cross_layer", step, sample.row(step))
        assert str(error.value) == (
            f"no space left on disk for {folder}: step {step} of table 'cross_layer' was not recorded; "
            f"the {step:,} rows recorded before are kept. Free some space and go on with --resume"
        )
        assert whole(folder, sample) == list(range(step))
        left = 100
        writer.write("cross_layer", step, sample.row(step))
        assert whole(folder, sample) == list(range(step + 1))
    writer.close()


def test_a_row_written_anew_is_the_old_one_the_new_one_or_none(folder, sample, monkeypatch):
    """The process ends after each of the writes that replace a recorded row in turn."""
    original, left = RowStore.set, 0

    async def ending(self, key, value):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "gone")
        await original(self, key, value)

    monkeypatch.setattr(RowStore, "set", ending)
    seen = []
    for writes in range(6):
        left = 100
        with RunWriter.create(folder.with_name(f"b{writes}"), {}) as writer:
            writer.add_table(sample.table, range(4))
            writer.write("cross_layer", 2, sample.row(2))
            left = writes
            with suppress(OSError):
                writer.write("cross_layer", 2, sample.row(30))
            left = 100
        table = open_run(writer.folder)["cross_layer"].to_dataset()
        # 2 from the old row and 30 from the new one, by each variable; a mixture would show both.
        seen.append({*(table["count"].values // 2).tolist(), *table["coupling"].values[:, 0, 0].tolist(),
                     *(1 / table["loss"].values - 1).round().tolist()})  # fmt: skip
    assert seen == [{2}, set(), set(), set(), set(), {30}]


def test_a_disk_full_at_the_beginning_leaves_nothing(folder, sample, monkeypatch):
    async def full(self, key, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = RunWriter.create(folder, {})
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "set", full)
        with pytest.raises(UserError, match="cannot write a run to .*No space left.*nothing was recorded"):
            RunWriter.create(folder.with_name("b"), {})
        with pytest.raises(UserError, match="table 'train' was not laid out; the 0 rows"):
            writer.add_table(sample.train, [0])
    assert list(folder.with_name("b").iterdir()) == []
    assert list(open_run(folder).children) == []
    writer.add_table(sample.train, [0])
    writer.close()


def test_other_errors_of_the_system_are_not_called_a_full_disk(recorded, sample, monkeypatch):
    async def broken(self, key, value):
        raise OSError(errno.EIO, "Input/output error")

    with RunWriter.reopen(recorded) as writer:
        monkeypatch.setattr(RowStore, "set", broken)
        with pytest.raises(OSError, match="Input/output"):
            writer.write("cross_layer", 20, sample.row(20))


def test_ctrl_c_in_the_middle_of_a_row_leaves_the_next_rows_whole(folder, sample, monkeypatch):
    writer = RunWriter.create(folder, {})
    writer.add_table(sample.table, None)
    original = RowStore.set

    async def slow(self, key, value):
        await asyncio.sleep(0.01)
        await original(self, key, value)

    def interrupted(coroutine):
        asyncio.run_coroutine_threadsafe(coroutine, zarr.core.sync._get_loop())
        raise KeyboardInterrupt

    monkeypatch.setattr(RowStore, "set", slow)
    for step in range(6):
        with monkeypatch.context() as patch:
            if step % 2:
                patch.setattr(rows, "sync", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    writer.write("cross_layer", step, sample.row(step))
            else:
                writer.write("cross_layer", step, sample.row(step))
    assert whole(folder, sample) == list(range(6))
    writer.close()


def test_writing_a_row_reads_nothing(folder, sample, monkeypatch):
    writer = RunWriter.create(folder, {})
    writer.add_table(sample.table, range(400))
    writer.write("cross_layer", 0, sample.row(0))
    reads = []
    original = LocalStore.get

    async def counted(self, key, *args, **kwargs):
        reads.append(key)
        return await original(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", counted)
    for step in range(1, 200):
        writer.write("cross_layer", step, sample.row(step))
    assert reads == []
    writer.close()


@pytest.mark.processes
def test_a_second_process_may_not_write(folder):
    code = (
        "import sys; from pathlib import Path; from hessprobe.store.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    RunWriter.create(folder, {}).close()
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is writing to the run"):
            RunWriter.reopen(folder)
        open_run(folder)  # readers may come in any number
        other.kill()
    with RunWriter.reopen(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["log.zarr"]
