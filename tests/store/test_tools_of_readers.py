"""An opened log in the hands of the tools people have: xarray's alignment, plots and files, pickles, pools of workers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from numbers import Number
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from hessprobe.store import RunWriter, Table, open_run
from hessprobe.store.attributes import portable

SAMPLE_RUN = Path(__file__).parents[2] / "data" / "sample_run"
ENGINES = ["scipy", *(["h5netcdf"] if find_spec("h5netcdf") else [])]


@pytest.fixture
def short(recorded) -> xr.Dataset:
    return open_run(recorded)["cross_layer"].to_dataset()


@pytest.fixture
def long(tmp_path, sample) -> xr.Dataset:
    with RunWriter.create(tmp_path / "long", {}) as writer:
        writer.add_table(sample.table, None)
        for step in (0, 5, 10, 15, 20, 30):
            writer.write("cross_layer", step, sample.row(step))
    return open_run(tmp_path / "long")["cross_layer"].to_dataset()


def test_runs_of_two_lengths_align_by_label(short, long):
    both = xr.concat([short, long], dim="run", join="outer")
    assert both.step.values.tolist() == [0, 5, 10, 15, 20, 30]
    assert both.note.sel(step=5).values.tolist() == ["step 5", "step 5"]
    assert (
        np.isnan(both["loss"].sel(run=0, step=[20, 30])).all()
        and both.failure.isel(run=0).isnull().sum() == 2
    )
    aligned, _ = xr.align(short, long, join="outer")
    assert aligned.sizes["step"] == 6 and aligned.note.sel(step=15).item() == "step 15"
    assert short.reindex(step=range(3)).failure.isnull().values.tolist() == [False, True, True]
    # Labels of blocks align too: another order and a block that one of them lacks.
    fewer = long.sel(block=["head", "embedding"])
    assert (fewer["coupling"] - short["coupling"]).sizes["block"] == 2
    assert short.reindex(block=["head", "new"])["coupling"].isnull().all(("step", "other_block")).values.tolist() == [
        False, True,
    ]  # fmt: skip
    assert set(both.to_dataframe().columns) >= {"loss", "note", "failure"}


def test_laziness_survives_alignment(short, long):
    assert xr.concat([short, long], dim="run", join="outer")["coupling"].chunks is not None


def test_labels_are_plotted(short):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    short["coupling"].isel(step=0).plot()
    short["coupling"].isel(step=0, block=0).plot()
    pyplot.close("all")


def same(found: xr.Dataset, wanted: xr.Dataset) -> None:
    assert set(found.variables) == set(wanted.variables)
    for name, variable in wanted.variables.items():
        np.testing.assert_array_equal(found[name].values, variable.values, str(name))
        assert found[name].attrs.get("units") == variable.attrs["units"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["cross_layer", "gn_hessian", "preconditioner", "train"])
def test_a_table_of_an_earlier_version_is_saved_as_netcdf(name, engine, tmp_path):
    """Its attributes hold None, truth values and a mapping, which netCDF has no type for."""
    table = open_run(SAMPLE_RUN)[name].to_dataset()
    table.to_netcdf(tmp_path / "table.nc", engine=engine)
    same(xr.open_dataset(tmp_path / "table.nc", engine=engine, decode_times=False), table)
    for attributes in (table.attrs, *(v.attrs for v in table.variables.values())):
        assert all(
            isinstance(v, str | Number | list) and not isinstance(v, bool) for v in attributes.values()
        )


def test_aligned_runs_are_saved_as_netcdf(short, long, tmp_path):
    xr.concat([short, long], dim="run", join="outer").to_netcdf(tmp_path / "both.nc", engine="scipy")
    assert xr.open_dataset(tmp_path / "both.nc", engine="scipy", decode_times=False).sizes["step"] == 6


def test_a_table_is_saved_as_zarr_again_without_a_warning(short, tmp_path):
    short.to_zarr(tmp_path / "table.zarr", consolidated=False)
    same(xr.open_zarr(tmp_path / "table.zarr", consolidated=False).load(), short)


def test_attributes_are_of_types_that_netcdf_has(folder, sample):
    given = {
        "nothing": None, "yes": True, "count": 3, "mu": 0.1, "text": "é", "mapping": {"a": None}, "names": ["a", "b"],
        "numbers": [1, 2.5], "none_at_all": [], "pairs": [[1, 2]], "scalar": np.float32(2), "array": np.arange(2),
        "truths": (True, False),
    }  # fmt: skip
    wanted = {
        "yes": 1, "count": 3, "mu": 0.1, "text": "é", "mapping": '{"a": null}', "names": '["a", "b"]',
        "numbers": [1, 2.5], "none_at_all": "[]", "pairs": "[[1, 2]]", "scalar": 2.0, "array": [0, 1],
        "truths": "[true, false]",
    }  # fmt: skip
    assert portable(given) == wanted
    with RunWriter.create(folder, given) as writer:
        writer.add_table(
            Table(name="train", variables=sample.train.variables, coordinates={}, attributes=given), [0]
        )
        writer.write("train", 0, {"loss": 1.0})
    group = zarr.open_group(folder / "log.zarr", mode="r")
    assert {**wanted, "schema_version": 1} == dict(group.attrs) == open_run(folder).attrs
    assert {**wanted, "length_unknown": 0} == dict(group["train"].attrs)
    open_run(folder)["train"].to_dataset().to_netcdf(folder / "train.nc", engine="scipy")


def _loss(run: xr.DataTree) -> float:
    return float(run["cross_layer"]["loss"].sum())


def test_an_opened_log_goes_to_threads_and_pickles_into_other_processes(recorded):
    run = open_run(recorded)
    right = _loss(run)
    assert _loss(pickle.loads(pickle.dumps(run))) == right
    with ThreadPoolExecutor(4) as pool:
        assert (
            set(pool.map(_loss, [run] * 8))
            == set(pool.map(lambda at: _loss(open_run(at)), [recorded] * 8))
            == {right}
        )


@pytest.mark.processes
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("known", [True, False], ids=["hessprobe", "plain xarray"])
def test_forked_workers_read_after_their_parent_has_read(recorded, known):
    """dask's threads do not come along through a fork, whether hessprobe or plain xarray started them."""
    read = "hp.open_run(folder)['cross_layer']" if known else "plain(folder)"
    code = f"""
        import multiprocessing, sys
        import xarray as xr

        def plain(folder):
            return xr.open_zarr(folder + "/log.zarr", group="cross_layer", consolidated=False)

        def opened(folder):
            import hessprobe as hp
            return float(hp.open_run(folder)["cross_layer"]["loss"].sum())

        def inherited(_):
            return float(before["loss"].sum())

        folder = sys.argv[1]
        if {known}:
            import hessprobe as hp
        before = {read}
        right = inherited(0)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map_async(opened, [folder]).get(timeout=60) == [float(opened(folder))]
            assert pool.map_async(inherited, [0]).get(timeout=60) == [right]
        """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(recorded)], check=True, timeout=150, env=environment
    )


NAMES = [
    "lr::0.1", "zip::a", "file:", "s3:", "memory:", "a#b?c=d&e", "50%20x", "%zz", "a b", "ü∂", "[x]*{y}", "~", "$HOME",
    "-x", "it's \"so\"", "log.zarr",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_be_called_anything(name, sample, tmp_path, monkeypatch):
    """Names that URLs and shells give a meaning; given relative, and the working directory moves meanwhile."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = f"runs/{name}/run"
    with RunWriter.create(folder, {}) as writer:
        writer.add_table(sample.train, None)
        monkeypatch.chdir("elsewhere")
        for step in range(66):  # beyond the first block of rows: the table grows
            writer.write("train", step, {"loss": 1.0})
    monkeypatch.chdir("..")
    with RunWriter.reopen(folder) as writer:
        writer.add_table(sample.train, None)
        monkeypatch.chdir("elsewhere")
        writer.write("train", 66, {"loss": 1.0})
    run = open_run(Path("..") / folder)
    monkeypatch.chdir("..")
    assert float(run["train"]["loss"].sum()) == 67
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "runs"] and not os.listdir("elsewhere")


def test_a_log_opened_before_it_grew_and_after_are_two(folder, sample):
    """dask names what it reads: of one name, one of the two would be read for both."""
    with RunWriter.create(folder, {}) as writer:
        writer.add_table(sample.train, None)
        writer.write("train", 0, {"loss": 0.0})
        before = open_run(folder)["train"]["loss"]
        for step in range(1, 200):
            writer.write("train", step, {"loss": step})
        after = open_run(folder)["train"]["loss"]
    assert float(xr.concat([after, before], dim="step").sum()) == sum(range(200))
