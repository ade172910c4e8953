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
from hessprobe.store import layout
from hessprobe.store.log import find_log, table_names
from hessprobe.store.schema import RECORDED, STEP

_SOURCE = "source"


def open_run(path: Path | str) -> xr.DataTree:
    """Returns the log of a run, one node per table, each trimmed to the rows recorded so far, by step.

    `path` is the run's folder or its log.zarr; the run may still be writing, and what it records later needs
    a new call. Data are read when they are used (dask); the root's attributes are the run's. Rows that failed
    are NaN, with the reason in `failure`. UserError for no run, a torn one, or one of a newer version.
    """
    path = Path(path)
    log, attributes = find_log(path)
    layout.restore(log.parent)
    root = xr.Dataset(attrs=attributes)
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
            marks = zarr.open_group(log / name, mode="r", use_consolidated=False)[RECORDED]
            recorded = np.asarray(cast(zarr.Array, marks)[:])
            return _trimmed(xr.open_zarr(log, group=name, consolidated=False, chunks={}), recorded)
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
