"""How one row of a table reaches the disk: its data, then its `recorded` mark, at 0.25 ms a variable.

A growing table takes rows in order of arrival; a table of known steps has a place for each.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.api import asynchronous
from zarr.core.buffer import Buffer
from zarr.core.sync import sync
from zarr.storage import LocalStore

from hessprobe.errors import UserError
from hessprobe.store import layout
from hessprobe.store.log import LOG
from hessprobe.store.schema import FAILURE, GROWTH_ROWS, RECORDED, STEP, Table


class RowStore(LocalStore):
    """zarr's local store, but a chunk that exists with the same size is overwritten in place.

    Rows already recorded are rewritten with the bytes they have, so a kill or a reader in the middle can only see
    the row in hand change, which carries no `recorded` mark then. Renaming over an existing file, as the local
    store does, makes ext4 flush it: 1.5 ms for every series, 30 ms for a row that takes 4 this way.
    Only for numbers without compression: metadata and text must keep their rename.
    """

    async def set(self, key: str, value: Buffer) -> None:
        """Writes a chunk: in place if it is there with the same size, else by zarr's write-and-rename."""
        try:
            with open(self.root / key, "r+b") as file:
                if os.fstat(file.fileno()).st_size == len(value):
                    file.write(value.as_buffer_like())
                    return
        except FileNotFoundError:
            pass
        await super().set(key, value)


class TableRows:
    """One table of the log, open for writing.

    Holds the chunk each variable is filling, so that no write reads; they are dropped after a failed write, since
    what then lies on disk is not known.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._open()

    def _open(self) -> None:
        path = self.folder / LOG / self.name
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        self._on_disk: dict[str, Any] = dict(group.arrays())
        if missing := {STEP, RECORDED, FAILURE} - set(self._on_disk):
            raise UserError(f"{path} is torn: it has no {', '.join(sorted(missing))}; copy the run again")
        self._grows = bool(group.attrs[layout.GROWS])
        rowwise = [name for name, array in self._on_disk.items() if layout.dimensions(array)[0] == STEP]
        self._variables = [name for name in rowwise if name not in (STEP, RECORDED, FAILURE)]
        self._arrays = sync(_open_arrays(path, {name: layout.dtype(self._on_disk[name]) for name in rowwise}))
        self._chunks: dict[str, tuple[int, np.ndarray]] = {}
        self._steps = np.asarray(self._on_disk[STEP][:])
        self._recorded = np.asarray(self._on_disk[RECORDED][:])
        # A growing table is free from the row after the last recorded one, even if a kill left a step label there.
        used = int(np.flatnonzero(self._recorded)[-1]) + 1 if self._recorded.any() else 0
        self._next = used if self._grows else len(self._steps)
        self._row_of = {int(step): row for row, step in enumerate(self._steps[: self._next])}

    def recorded_steps(self) -> list[int]:
        """The steps of the whole rows, in row order."""
        return [int(step) for step in self._steps[self._recorded]]

    def checked(self, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The row as arrays of the table's dtypes; ValueError for other variables or shapes than the table's."""
        if set(row) != set(self._variables):
            missing, unknown = sorted(set(self._variables) - set(row)), sorted(set(row) - set(self._variables))
            raise ValueError(f"a row of table {self.name!r}: missing {missing}, unknown {unknown}")
        values = {}
        for name, given in row.items():
            array = self._arrays[name]
            values[name] = np.asarray(given, dtype=array.dtype)
            if values[name].shape != array.shape[1:]:
                raise ValueError(
                    f"{name!r} of table {self.name!r} has shape {array.shape[1:]} a row, got {values[name].shape}"
                )
        return values

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of fill values: NaN for floats, -1 for integers."""
        arrays = {name: self._arrays[name] for name in self._variables}
        return {name: np.full(a.shape[1:], a.metadata.fill_value, dtype=a.dtype) for name, a in arrays.items()}

    def put(self, step: int, values: Mapping[str, np.ndarray], failure: str) -> None:
        """Writes the row of a step, replacing one recorded before, and marks it. Grows the table if it must."""
        row = self._row_of.get(step, self._next)
        if row == len(self._steps):
            if not self._grows:
                raise ValueError(f"step {step} is not among the {row:,} steps table {self.name!r} was laid out for")
            if step < 0:
                raise ValueError(f"step {step} of table {self.name!r}: steps count from 0")
            # A quarter more, in whole blocks: the links to make stay in proportion to the rows written.
            self._grow(row + GROWTH_ROWS * max(1, row // (4 * GROWTH_ROWS)))
        cells = {**values, FAILURE: np.asarray(failure, dtype=self._arrays[FAILURE].dtype)}
        if self._grows:
            cells[STEP] = np.asarray(step, dtype=np.int64)
        ended = threading.Event()

        async def write() -> None:
            try:
                await self._write(row, step, cells)
            finally:
                ended.set()

        try:
            sync(write())
        except BaseException:
            # Ctrl-C leaves zarr's thread writing: two writes at once could undo each other.
            ended.wait(timeout=10)
            self._chunks.clear()
            raise

    async def _write(self, row: int, step: int, cells: Mapping[str, np.ndarray]) -> None:
        await _all(self._load(name, row) for name in (*cells, RECORDED))
        if self._cell(RECORDED, row)[()]:
            await self._mark(row, False)
        changed = [name for name, value in cells.items() if not _identical(self._cell(name, row), value)]
        for name in changed:
            self._cell(name, row)[...] = cells[name]
        await _all(self._flush(name) for name in changed)
        await self._mark(row, True)
        self._steps[row], self._row_of[step], self._next = step, row, max(self._next, row + 1)

    async def _mark(self, row: int, whole: bool) -> None:
        self._cell(RECORDED, row)[...] = whole
        await self._flush(RECORDED)
        self._recorded[row] = whole

    async def _load(self, name: str, row: int) -> None:
        array = self._arrays[name]
        start = row - row % array.chunks[0]
        if name not in self._chunks or self._chunks[name][0] != start:
            stop = min(start + array.chunks[0], array.shape[0])
            self._chunks[name] = start, np.array(await array.getitem(slice(start, stop)))

    def _cell(self, name: str, row: int) -> np.ndarray:
        start, chunk = self._chunks[name]
        return chunk[row - start, ...]

    async def _flush(self, name: str) -> None:
        start, chunk = self._chunks[name]
        await self._arrays[name].setitem(slice(start, start + len(chunk)), chunk)

    def _grow(self, rows: int, steps: Sequence[int] | None = None) -> None:
        layout.grow_table(self.folder, self.name, rows, steps)
        self._open()

    def continue_as(self, table: Table, steps: Sequence[int] | None) -> None:
        """Checks that the table on disk is the one declared, and adds the steps that go beyond the old ones."""
        if differences := layout.differences(self._on_disk, table):
            raise UserError(
                f"{self.folder}: table {self.name!r} was recorded differently ({'; '.join(differences)}); "
                "record into another folder"
            )
        old = [] if self._grows else [int(step) for step in self._steps]
        new = [] if steps is None else list(steps)
        if self._grows != (steps is None) or new[: len(old)] != old[: len(new)]:
            raise UserError(
                f"{self.folder}: table {self.name!r} was laid out for other steps ({_outline(old)}, "
                f"now {_outline(new)}); record into another folder"
            )
        if len(new) > len(old):
            self._grow(len(new), new)


async def _open_arrays(path: Path, dtypes: Mapping[str, str]) -> dict[str, Any]:
    stores = {name: LocalStore(path) if dtype == "str" else RowStore(path) for name, dtype in dtypes.items()}
    # Without write_empty_chunks zarr compares every chunk with the fill value and deletes files.
    config = {"write_empty_chunks": True}
    opened = (asynchronous.open_array(store=s, path=n, mode="r+", config=config) for n, s in stores.items())
    return dict(zip(dtypes, await asyncio.gather(*opened), strict=True))


async def _all(tasks: Any) -> None:
    # Waits for every task before it raises: none may still be writing when the caller goes on.
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _identical(cell: np.ndarray, value: np.ndarray) -> bool:
    # To the bit, so that NaN equals NaN and -0.0 does not equal 0.0.
    if cell.dtype.kind in "TO":
        return bool(np.all(cell == value))
    return cell.tobytes() == value.tobytes()


def _outline(steps: Sequence[int]) -> str:
    return f"{len(steps):,} from {steps[0]} to {steps[-1]}" if steps else "length unknown"
