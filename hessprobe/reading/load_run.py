"""A log read into memory once, but for layer kernels, so that a chunk that cannot be read is met here and said."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from hessprobe.errors import UserError
from hessprobe.store.reader import open_run

# Layer kernels of a long run can be larger than memory, and a few rows of them are looked at. Everything else is small:
# above this it would be no log of ours.
LOADED_UP_TO = 256 * 2**20
LAZY = "other_sketch"


def load_run(path: Path | str) -> xr.DataTree:
    """Returns a run as `open_run` does, with every variable up to 256 MiB in memory; layer kernels stay lazy.

    Raises:
        UserError: no run there, a newer version wrote it, or a table is damaged.
    """
    run = open_run(path)
    tables: dict[str, xr.Dataset] = {"/": run.to_dataset()}
    for name in run.children:
        table = run[name].to_dataset()
        small = [
            variable
            for variable, values in table.data_vars.items()
            if LAZY not in values.dims and values.nbytes <= LOADED_UP_TO
        ]
        try:
            tables[f"/{name}"] = table.assign(table[small].load().data_vars)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path}: table {name!r} is damaged ({error}); copy the run again from where it was recorded"
            ) from error
    return xr.DataTree.from_dict(tables)
