"""How a log is read: as an xarray.DataTree of the rows recorded so far, lazily, also while the run goes on.

Nothing here is needed to read a log: xr.open_zarr(path, group=table, consolidated=False) does, rows laid out
in advance included; this trims them and turns what can be wrong with a folder into one line.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import numpy as np
import xarray as xr
import zarr

from hessprobe.errors import UserError
from hessprobe.schema.table import RECORDED, STEP
from hessprobe.store import layout
from hessprobe.store.attributes import portable
from hessprobe.store.forks import read_after_forks
from hessprobe.store.log import LogStore, find_log, table_names

_SOURCE = "source"


def open_run(path: Path | str) -> xr.DataTree:
    """Returns the log of a run, one node per table, each trimmed to the rows recorded so far, by step.

    `path` is the run's folder or its log.zarr; the run may still be writing, and what it records later needs
    a new call. Numbers are read when they are used (dask); text is in memory, at fixed width, as plots, netCDF and
    alignment by label need it. The root's attributes are the run's. Rows that failed are NaN, with the reason in
    `failure`. UserError for no run, a torn one, or one of a newer version.
    """
    path = Path(path)
    log, attributes = find_log(path)
    log = log.absolute()  # what is read later must not depend on the working directory then
    layout.restore(log.parent)
    read_after_forks()
    root = xr.Dataset(attrs=portable(attributes))
    root.encoding[_SOURCE] = str(path)
    tables = {f"/{name}": _open_table(log, name) for name in table_names(log)}
    return xr.DataTree.from_dict({"/": root, **tables})


def require_table(tree: xr.DataTree, name: str) -> xr.Dataset:
    """Returns one table of an opened run; UserError, saying what was recorded, if the run has none such."""
    if name in tree.children:
        return tree[name].to_dataset()
    probes = recorded_probes(tree)
    how = f"with --probe {' '.join(probes)}" if probes else "without --probe"
    raise UserError(
        f"{tree.encoding.get(_SOURCE, 'this log')} holds no table {name!r}; it was recorded {how}"
    )


def recorded_probes(tree: xr.DataTree) -> tuple[str, ...]:
    """The probes an opened run was recorded with, sorted: its tables but `train`."""
    return tuple(sorted(name for name in tree.children if name != "train"))


def _open_table(log: Path, name: str) -> xr.Dataset:
    # A table that grows changes all its arrays' lengths in one move, but they are opened one after the other:
    # an opening that straddles the move sees two lengths and fails. It is over in milliseconds; open again.
    for attempt in range(6):
        try:
            # The marks come first: a row marked before its label is read has its label.
            store = LogStore(log, read_only=True)
            marks = zarr.open_group(store, path=name, mode="r", use_consolidated=False)[RECORDED]
            recorded = np.asarray(cast(zarr.Array, marks)[:])
            table = xr.open_zarr(store, group=name, consolidated=False, chunks={})
            return _plain(_trimmed(table, recorded))
        except (OSError, ValueError, KeyError) as error:
            if attempt == 5:
                what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{log / name} is torn: {what}; copy the run again") from error
            time.sleep(0.02 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _trimmed(table: xr.Dataset, recorded: np.ndarray) -> xr.Dataset:
    rows = np.flatnonzero(recorded)
    rows = rows[np.argsort(table[STEP].values[rows], kind="stable")]
    table = table.drop_vars(RECORDED)
    # A slice where one serves keeps the chunks of the files, and so the laziness, as they are.
    leading = np.array_equal(rows, np.arange(len(rows)))
    return table.isel({STEP: slice(len(rows)) if leading else rows})


def _plain(table: xr.Dataset) -> xr.Dataset:
    """Returns the table as it may be aligned and saved in other formats.

    Text is at fixed width (numpy's own StringDType has no missing value to align by), attributes are of types that netCDF
    has (logs of earlier versions hold others), and nothing is left of how the log stores it: integers that alignment made
    floats would be saved as integers, their missing values lost.
    """
    texts = {
        name: xr.Variable(
            variable.dims,
            variable.values.astype(object).astype(str),
            variable.attrs,
            # Saved again it has no fixed width: zarr's specification knows none.
            {"dtype": np.dtype(object)},
        )
        for name, variable in table.variables.items()
        if variable.dtype.kind in "TO"
    }
    plain = table.drop_encoding().assign(texts)
    plain.attrs = portable(table.attrs)
    return plain
