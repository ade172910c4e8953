"""How a table comes to lie on disk: whole, in one move, so that no instant shows half of one.

A table is built in a folder beside log.zarr and renamed into place; a grown table is built there from hard
links to the chunks it keeps, and the two directories are exchanged (Linux renameat2, RENAME_EXCHANGE).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from zarr.storage import LocalStore

from hessprobe.schema.table import DIMENSIONS, FILL_VALUES, GROWTH_ROWS, STEP, Table, bookkeeping_variables
from hessprobe.store.attributes import portable
from hessprobe.store.log import BUILDING, LOG

GROWS = "length_unknown"
_ASIDE = ".aside"


def create_table(folder: Path, table: Table, steps: Sequence[int] | None) -> None:
    """Lays out folder/log.zarr/TABLE for the given steps, or a first block of rows if they are unknown."""
    building = folder / BUILDING / table.name
    shutil.rmtree(building, ignore_errors=True)
    group = zarr.create_group(
        LocalStore(building), attributes={**portable(table.attributes), GROWS: int(steps is None)}
    )
    rows = GROWTH_ROWS if steps is None else len(steps)
    for dim, labels in table.coordinates.items():
        values = np.asarray(labels)
        attributes: dict[str, Any] = {"long_name": DIMENSIONS.get(dim, dim.replace("_", " ")), "units": "1"}
        # Fixed-width text would be outside the zarr v3 specification; `str` is variable-length UTF-8.
        kind = str if values.dtype.kind in "UTO" else values.dtype
        group.create_array(
            dim,
            shape=values.shape,
            dtype=kind,
            compressors=None,
            dimension_names=(dim,),
            attributes=attributes,
        )[:] = values.astype(object) if kind is str else values
    for variable in (*table.variables, *bookkeeping_variables()):
        inner, chunk = table.row_shape(variable), table.chunk_rows(variable)
        # Uncompressed: numbers with random last digits hardly shrink, and a chunk of constant size can be
        # rewritten in place with nothing but the row in hand changing (store.rows.RowStore).
        group.create_array(
            variable.name,
            shape=(rows, *inner),
            chunks=(chunk if steps is None else max(1, min(chunk, rows)), *inner),
            dtype=str if variable.dtype == "str" else variable.dtype,
            fill_value=FILL_VALUES[variable.dtype],
            compressors=None,
            dimension_names=variable.dims,
            attributes=variable.attributes,
        )
    if steps is None:
        group[STEP].attrs["comment"] = (
            "-1: a row laid out in advance that no step has reached yet. Keep rows where `recorded` is true"
        )
    else:
        _label(group, steps)
    os.rename(building, folder / LOG / table.name)


def annotate_log(folder: Path, attributes: Mapping[str, str]) -> None:
    """Adds root attributes to folder/log.zarr: the metadata file is replaced in one move."""
    zarr.open_group(folder / LOG, mode="r+", use_consolidated=False).attrs.update(dict(attributes))


def _label(group: zarr.Group, steps: Sequence[int]) -> None:
    cast(zarr.Array, group[STEP])[:] = np.asarray(steps, dtype=np.int64)


def grow_table(folder: Path, name: str, rows: int, steps: Sequence[int] | None = None) -> None:
    """Gives folder/log.zarr/NAME `rows` rows in one move; with `steps`, also their step labels.

    What a reader has open stays readable: chunk files keep their names and, being links, their contents.
    """
    table, building = folder / LOG / name, folder / BUILDING / name
    shutil.rmtree(building, ignore_errors=True)
    for path, _, files in os.walk(table):
        copy = building / Path(path).relative_to(table)
        copy.mkdir(parents=True)
        for file in files:
            if not file.endswith(".partial"):  # what a kill left of zarr's write-and-rename
                _link(os.path.join(path, file), copy / file)
    group = zarr.open_group(LocalStore(building), mode="r+", use_consolidated=False)
    for _, array in group.arrays():
        if dimensions(array)[0] == STEP:
            array.resize((rows, *array.shape[1:]))
    if steps is not None:
        _label(group, steps)
    exchange(building, table)


def _link(source: str, target: Path) -> None:
    # zarr renames a new file over metadata and text, so their links part; chunks of numbers are rewritten in
    # place through both names, which both tables want: a row belongs to the old and to the grown one.
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copy2(source, target)  # a file system without hard links


def exchange(building: Path, table: Path) -> None:
    """Swaps two directories, atomically where the system can; the old table ends where the new one was built.

    It is left there until the next growth or the end, for readers that had just begun to open it.
    """
    if _rename_exchange(building, table):
        return
    # Two renames: for an instant the table is missing. `restore` puts it back if the process dies there.
    aside = building.with_name(building.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    for _ in range(10):
        os.rename(table, aside)
        try:
            os.rename(building, table)
            return
        except OSError as error:
            # Not empty: a reader found the table missing and put the old one back first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                os.rename(aside, table)
                raise
    raise OSError(errno.EBUSY, "readers keep restoring the table", str(table))


def _rename_exchange(first: Path, second: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    # Not every file system knows the flag (NFS, some overlays); any other failure is a failure.
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def restore(folder: Path) -> None:
    """Puts back a table whose growth was cut off between two renames. Safe beside a running writer."""
    for aside in sorted((folder / BUILDING).glob("*" + _ASIDE)):
        table = folder / LOG / aside.name.removesuffix(_ASIDE)
        if not table.exists():
            time.sleep(0.05)  # a living writer needs microseconds for its second rename
            if not table.exists():
                with suppress(OSError):
                    os.rename(aside, table)


def clear_building(folder: Path) -> None:
    """Removes what was built beside the log and is not, or no longer, part of it. Only for the writer."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)


def dimensions(array: Any) -> tuple[str, ...]:
    """The dimension names of a zarr array."""
    return tuple(array.metadata.dimension_names)


def dtype_name(array: Any) -> str:
    """The dtype of a zarr array by the schema's name: "str" for text of any representation."""
    native = array.metadata.data_type.to_native_dtype()
    return "str" if native.kind in "TOU" else native.name


def differences_from(on_disk: Mapping[str, Any], table: Table) -> list[str]:
    """Returns how a declared table differs from the one on disk, a phrase each; long_name is only wording."""
    declared = {variable.name: variable for variable in (*table.variables, *bookkeeping_variables())}
    labels = set(table.coordinates)
    found = []
    if gone := sorted(set(on_disk) - set(declared) - labels):
        found.append(f"it also has {', '.join(gone)}")
    if new := sorted((set(declared) | labels) - set(on_disk)):
        found.append(f"it lacks {', '.join(new)}")
    for name in sorted(set(declared) & set(on_disk)):
        variable, array = declared[name], on_disk[name]
        was = (dimensions(array), dtype_name(array), array.attrs.get("units"), array.attrs.get("estimator"))
        now = (variable.dims, variable.dtype, variable.units, variable.estimator)
        if was != now:
            found.append(f"{name}: {_phrase(was)} there, {_phrase(now)} now")
    for dim in sorted(set(table.coordinates) & set(on_disk)):
        was, now = list(on_disk[dim][:]), list(table.coordinates[dim])
        if was != now:
            found.append(f"{dim}: {_phrase(was)} there, {_phrase(now)} now")
    return found


def _phrase(values: Sequence) -> str:
    shown = [f"({', '.join(value)})" if isinstance(value, tuple) else str(value) for value in values]
    return ", ".join([*shown[:6], "..."] if len(shown) > 6 else shown)
