"""What was recorded is what is read, by hessprobe and by plain xarray; what cannot be read says why in a line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hessprobe.errors import UserError
from hessprobe.store import RunWriter, Table, Variable, open_run, recorded_probes, require_table


def test_rows_not_recorded_never_show_and_failed_rows_say_why(recorded, sample):
    table = open_run(recorded)["cross_layer"].load()
    assert table.step.values.tolist() == [0, 5, 10, 15]
    assert "recorded" not in table.variables
    assert table.failure.values.tolist() == ["", "", "out of memory", ""]
    assert np.isnan(table["loss"].sel(step=10)) and np.isnan(table["coupling"].sel(step=10)).all()
    assert table["count"].sel(step=10) == -1 and table["note"].sel(step=10).item() == ""
    for step in (0, 5, 15):
        for name, value in sample.row(step).items():
            np.testing.assert_array_equal(table[name].sel(step=step).values, value)


def test_labels_units_estimators_and_attributes_come_back(recorded):
    tree = open_run(recorded)
    assert tree.attrs == {"name": "a", "seed": 3, "schema_version": 1}
    table = tree["cross_layer"].load()
    assert table.attrs["every"] == 5
    assert table["coupling"].attrs == {
        "long_name": "the coupling", "units": "nats per token", "estimator": "Hutchinson 1989, 8 samples",
    }  # fmt: skip
    assert table["coupling"].sel(step=5, block="block.0", other_block="head").item() == 10.0
    assert table.block.values.tolist() == ["embedding", "block.0", "head"]
    for name, variable in table.variables.items():
        assert {"long_name", "units"} <= set(variable.attrs), name


def test_reading_is_lazy_and_takes_the_log_itself_too(recorded):
    coupling = open_run(recorded / "log.zarr")["cross_layer"]["coupling"]
    assert coupling.chunks is not None
    assert coupling.sizes["step"] == 4


@pytest.mark.processes
def test_plain_xarray_opens_every_table(recorded):
    """The code runs with hessprobe forbidden, warnings as errors."""
    code = (
        "import sys, warnings; warnings.simplefilter('error'); sys.modules['hessprobe'] = None\n"
        "import xarray as xr\n"
        "t = xr.open_zarr(sys.argv[1], group='cross_layer', consolidated=False)\n"
        "assert t.sizes == {'step': 6, 'block': 3, 'other_block': 3}, t.sizes\n"
        "assert t.recorded.values.tolist() == [True, True, True, True, False, False]\n"
        "assert t.coupling.sel(step=5, block='head', other_block='embedding').values == 11.0\n"
        "t.isel(step=t.recorded.values).load()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(recorded / "log.zarr")], check=True)


def test_rows_come_in_order_of_step_whatever_the_order_of_writing(folder, sample):
    with RunWriter.create(folder, {}) as writer:
        writer.add_table(sample.train, None)
        for step in (7, 3, 5):
            writer.write("train", step, {"loss": step})
    table = open_run(folder)["train"].to_dataset()
    assert table.step.values.tolist() == [3, 5, 7] and table["loss"].values.tolist() == [3, 5, 7]


def test_an_empty_table_and_a_run_without_tables_open(folder, sample):
    with RunWriter.create(folder, {"name": "a"}) as writer:
        assert open_run(folder).attrs["name"] == "a"
        writer.add_table(sample.table, None)
        assert open_run(folder)["cross_layer"].sizes == {"step": 0, "block": 3, "other_block": 3}


def test_a_missing_table_says_what_was_recorded(recorded):
    tree = open_run(recorded)
    assert recorded_probes(tree) == ("cross_layer",)
    assert require_table(tree, "cross_layer").sizes["step"] == 4
    with pytest.raises(UserError) as error:
        require_table(tree, "preconditioner")
    says = f"{recorded} holds no table 'preconditioner'; it was recorded with --probe cross_layer"
    assert str(error.value) == says


def test_a_run_without_probes_says_so(folder, sample):
    with RunWriter.create(folder, {}) as writer:
        writer.add_table(sample.train, [0])
    with pytest.raises(UserError, match="holds no table 'cross_layer'; it was recorded without --probe"):
        require_table(open_run(folder), "cross_layer")


def _edit(log: Path, **attributes: object) -> None:
    metadata = json.loads((log / "zarr.json").read_text())
    metadata["attributes"].update(attributes)
    (log / "zarr.json").write_text(json.dumps(metadata))


def test_a_newer_log_says_both_versions(recorded):
    _edit(recorded / "log.zarr", schema_version=99)
    with pytest.raises(UserError, match=r"schema version 99; this hessprobe reads up to version 1\. Update"):
        open_run(recorded)


def test_a_foreign_zarr_store_is_told_apart(recorded):
    _edit(recorded / "log.zarr", schema_version=None)
    with pytest.raises(UserError, match="no log of hessprobe"):
        open_run(recorded)


def test_folders_that_are_no_run_say_what_is_near(recorded, tmp_path):
    cases = {
        recorded.parent / "b": r"there is no such folder; .* holds: a$",
        tmp_path / "x": r"there is no such folder; .* holds no run$",
        recorded.parent: r"the folder holds no log.zarr; runs in it: a$",
        recorded / "file": "it is not a folder",
        tmp_path / "empty": "the folder holds no log.zarr; give the folder",
    }
    (recorded / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, says in cases.items():
        with pytest.raises(UserError, match=says):
            open_run(path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("zarr.json", None, "log.zarr is torn: its zarr.json is missing"),
        ("zarr.json", "{", "log.zarr is torn: its zarr.json cannot be read"),
        ("cross_layer/zarr.json", None, "cross_layer is torn: its zarr.json is missing"),
        ("cross_layer/zarr.json", "{", "cross_layer is torn: "),
        ("cross_layer/loss/zarr.json", "{", "cross_layer is torn: "),
    ],
)
def test_a_torn_log_is_one_clear_line(recorded, name, text, says):
    file = recorded / "log.zarr" / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        open_run(recorded)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Object at")
def test_a_table_that_lost_its_marks_is_torn(recorded):
    shutil.rmtree(recorded / "log.zarr" / "cross_layer" / "recorded")
    with pytest.raises(UserError, match="cross_layer is torn: it has no 'recorded'; copy the run again"):
        open_run(recorded)


def test_leftovers_of_a_kill_do_not_matter(recorded):
    (recorded / "log.zarr" / "cross_layer" / "loss" / "c" / "0.0123.partial").write_bytes(b"torn")
    assert open_run(recorded)["cross_layer"].load().sizes["step"] == 4
    (recorded / ".log.zarr.building" / "cross_layer").mkdir(parents=True)
    with RunWriter.reopen(recorded) as writer:
        assert writer.recorded_steps("cross_layer") == [0, 5, 10, 15]
    assert [path.name for path in recorded.iterdir()] == ["log.zarr"]
    xr.open_zarr(recorded / "log.zarr", group="cross_layer", consolidated=False).load()


@pytest.mark.processes
def test_writing_and_reading_need_no_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import hessprobe.store as store\n"
        "v = store.Variable(name='loss', dims=('step',), units='1', long_name='', estimator='exact')\n"
        "with store.RunWriter.create(sys.argv[1], {}) as writer:\n"
        "    writer.add_table(store.Table(name='train', variables=(v,), coordinates={}), None)\n"
        "    writer.write('train', 0, {'loss': 1})\n"
        "assert store.open_run(sys.argv[1])['train']['loss'].values.tolist() == [1.0]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)


@pytest.mark.processes
def test_declaring_a_table_loads_neither_zarr_nor_xarray():
    code = "import sys, hessprobe.schema.table; assert not {'zarr', 'xarray', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


DTYPES = {
    "float64": st.floats(),
    "float32": st.floats(width=32),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "bool": st.booleans(),
    # A lone surrogate is no text in UTF-8, and numpy drops NUL at the end of fixed-width text.
    "str": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
}


@st.composite
def logs(draw):
    """A table, how it is laid out, and the rows (None: failed) in order of writing."""
    labels = st.lists(st.text("abc.é0", min_size=1), min_size=1, max_size=3, unique=True)
    sizes = {dim: draw(labels) for dim in ("block", "candidate")}
    variables = tuple(
        Variable(
            name=f"v{i}",
            dims=("step", *draw(st.lists(st.sampled_from(sorted(sizes)), max_size=2, unique=True))),
            units="1", long_name="", estimator="exact", dtype=draw(st.sampled_from(sorted(DTYPES))),
        )
        for i in range(draw(st.integers(1, 3)))
    )  # fmt: skip
    used = {dim for v in variables for dim in v.dims[1:]}
    table = Table(name="t", variables=variables, coordinates={d: sizes[d] for d in used})
    steps = draw(st.lists(st.integers(0, 200), min_size=1, max_size=6, unique=True))
    rows = []
    for step in draw(st.lists(st.sampled_from(steps), max_size=8)):
        row = {}
        for v in variables:
            shape = table.row_shape(v)
            count = int(np.prod(shape))
            cells = draw(st.lists(DTYPES[v.dtype], min_size=count, max_size=count))
            row[v.name] = np.array(cells, dtype=object if v.dtype == "str" else v.dtype).reshape(shape)
        rows.append((step, None if draw(st.integers(0, 4)) == 0 else row))
    return table, draw(st.sampled_from([None, steps])), rows


@settings(max_examples=20, deadline=None)
@given(logs())
def test_what_was_written_last_is_what_is_read(log):
    table, steps, rows = log
    with tempfile.TemporaryDirectory() as folder:
        with RunWriter.create(folder, {}) as writer:
            writer.add_table(table, steps)
            for step, row in rows:
                if row is None:
                    writer.fail("t", step, "planned")
                else:
                    writer.write("t", step, row)
        read = open_run(folder)["t"].load()
    last = dict(rows)
    assert read.step.values.tolist() == sorted(last)
    for step, row in last.items():
        assert read.failure.sel(step=step).item() == ("planned" if row is None else "")
        for name, value in (row or {}).items():
            np.testing.assert_array_equal(read[name].sel(step=step).values, value)
