"""How one row of a table reaches the disk: its data first, its `recorded` mark last.

A table of known steps has a place for each; a growing table takes rows in order of arrival.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.api import asynchronous
from zarr.codecs import BytesCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from hessprobe.errors import UserError
from hessprobe.schema.table import FAILURE, GROWTH_ROWS, RECORDED, STEP, Table
from hessprobe.store import layout
from hessprobe.store.log import LOG


class RowStore(LocalStore):
    """zarr's local store, but a chunk that exists with the same size is overwritten in place.

    Rows recorded before are rewritten with the bytes they have, so a kill or a reader in the middle sees
    only the row in hand change, which carries no `recorded` mark then. Renaming over an existing file, as
    the local store does, makes ext4 flush it: 1.5 ms for every series. Only for numbers without
    compression: text and metadata must keep their rename.
    """

    async def set(self, key: str, value: Buffer) -> None:
        """Writes a chunk in place if it is there with the same size, else by zarr's write-and-rename."""
        try:
            with open(f"{self.root}/{key}", "r+b") as file:
                if os.fstat(file.fileno()).st_size == len(value):
                    file.write(value.as_buffer_like())
                    return
        except FileNotFoundError:
            pass
        await super().set(key, value)


class TableRows:
    """One table of the log, open for writing.

    Holds the chunk that each variable is filling, so that no write reads; a failed write drops them, since
    what then lies on disk is not known.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._open()

    def _open(self) -> None:
        path = self.folder / LOG / self.name
        group = zarr.open_group(LocalStore(path), mode="r+", use_consolidated=False)
        self._on_disk: dict[str, Any] = dict(group.arrays())
        if missing := {STEP, RECORDED, FAILURE} - set(self._on_disk):
            raise UserError(f"{path} is torn: it has no {', '.join(sorted(missing))}; copy the run again")
        self._grows = bool(group.attrs[layout.GROWS])
        rowwise = [name for name, array in self._on_disk.items() if layout.dimensions(array)[0] == STEP]
        self._variables = [name for name in rowwise if name not in (STEP, RECORDED, FAILURE)]
        self._store = RowStore(path)
        self._arrays = sync(_open_arrays(path, rowwise))
        self._chunks: dict[str, tuple[int, np.ndarray]] = {}
        self._steps = np.asarray(self._on_disk[STEP][:])
        self._recorded = np.asarray(self._on_disk[RECORDED][:])
        # A growing table is free from the row after the last recorded one, even if a kill left a label there.
        used = int(np.flatnonzero(self._recorded)[-1]) + 1 if self._recorded.any() else 0
        self._next = used if self._grows else len(self._steps)
        self._row_of = {int(step): row for row, step in enumerate(self._steps[: self._next])}

    def recorded_steps(self) -> list[int]:
        """The steps of the whole rows, in row order."""
        return [int(step) for step in self._steps[self._recorded]]

    def checked(self, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The row as arrays of the table's dtypes; ValueError for other variables or shapes than its own."""
        if set(row) != set(self._variables):
            missing, unknown = (
                sorted(set(self._variables) - set(row)),
                sorted(set(row) - set(self._variables)),
            )
            raise ValueError(f"a row of table {self.name!r}: missing {missing}, unknown {unknown}")
        values = {}
        for name, given in row.items():
            array = self._arrays[name]
            values[name] = np.asarray(given, dtype=array.dtype)
            if values[name].shape != array.shape[1:]:
                raise ValueError(
                    f"a row of {name!r} in table {self.name!r} has shape {array.shape[1:]}, "
                    f"got {values[name].shape}"
                )
        return values

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of fill values: NaN for floats, -1 for integers."""
        arrays = {name: self._arrays[name] for name in self._variables}
        return {name: np.full(a.shape[1:], a.metadata.fill_value, a.dtype) for name, a in arrays.items()}

    def put(self, step: int, values: Mapping[str, np.ndarray], failure: str) -> None:
        """Writes and marks the row of a step, replacing one recorded before; grows the table if it must."""
        if step not in self._row_of and not (self._grows and step >= 0):
            if self._grows:
                raise ValueError(f"step {step} of table {self.name!r}: steps count from 0")
            raise ValueError(
                f"step {step} is not among the {len(self._steps):,} steps of table {self.name!r}"
            )
        row = self._row_of.get(step, self._next)
        if row == len(self._steps):
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
        await _all(self._load(name, row) for name in (*cells, RECORDED) if not self._holds(name, row))
        if self._cell(RECORDED, row)[()]:
            await self._mark(row, False)
        changed = [name for name, value in cells.items() if not _identical(self._cell(name, row), value)]
        for name in changed:
            self._cell(name, row)[...] = cells[name]
            await self._flush(name)
        await self._mark(row, True)
        self._steps[row], self._row_of[step], self._next = step, row, max(self._next, row + 1)

    async def _mark(self, row: int, whole: bool) -> None:
        self._cell(RECORDED, row)[...] = whole
        await self._flush(RECORDED)
        self._recorded[row] = whole

    def _holds(self, name: str, row: int) -> bool:
        if name not in self._chunks:
            return False
        start, chunk = self._chunks[name]
        return start <= row < start + len(chunk)

    async def _load(self, name: str, row: int) -> None:
        array = self._arrays[name]
        start = row - row % array.chunks[0]
        on_disk = await array.getitem(slice(start, start + array.chunks[0]))
        # At the table's end a chunk holds fewer rows than its file, which is always of full size.
        chunk = np.full(array.chunks, array.metadata.fill_value, dtype=array.dtype)
        chunk[: len(on_disk)] = on_disk
        self._chunks[name] = start, chunk

    def _cell(self, name: str, row: int) -> np.ndarray:
        start, chunk = self._chunks[name]
        return chunk[row - start, ...]

    async def _flush(self, name: str) -> None:
        start, chunk = self._chunks[name]
        array = self._arrays[name]
        if not _is_plain(array):
            stop = min(start + len(chunk), array.shape[0])
            await array.setitem(slice(start, stop), chunk[: stop - start])
            return
        # The chunk's bytes are its file, so they go to the store past zarr's codecs: 0.03 ms instead of 0.3.
        key = array.metadata.encode_chunk_key((start // len(chunk), *(0 for _ in chunk.shape[1:])))
        little_endian = chunk.astype(chunk.dtype.newbyteorder("<"), copy=False).tobytes()
        buffer = default_buffer_prototype().buffer.from_bytes(little_endian)
        await self._store.set(f"{name}/{key}", buffer)

    def _grow(self, rows: int, steps: Sequence[int] | None = None) -> None:
        layout.grow_table(self.folder, self.name, rows, steps)
        self._open()

    def continue_as(self, table: Table, steps: Sequence[int] | None) -> None:
        """Checks that the table on disk is the one declared, and adds the steps that go beyond its own."""
        if differences := layout.differences_from(self._on_disk, table):
            raise UserError(
                f"{self.folder}: table {self.name!r} was recorded differently ({'; '.join(differences)}); "
                "record into another folder"
            )
        old = [] if self._grows else [int(step) for step in self._steps]
        new = [] if steps is None else list(steps)
        if self._grows != (steps is None) or new[: len(old)] != old[: len(new)]:
            raise UserError(
                f"{self.folder}: table {self.name!r} was laid out for other steps ({_outline(old)} there, "
                f"{_outline(new)} now); record into another folder"
            )
        if len(new) > len(old):
            self._grow(len(new), new)


async def _open_arrays(path: Path, names: Sequence[str]) -> dict[str, Any]:
    # Without write_empty_chunks zarr compares every chunk with the fill value and deletes files.
    config = {"write_empty_chunks": True}
    opened = (
        asynchronous.open_array(store=LocalStore(path), path=name, mode="r+", config=config) for name in names
    )
    return dict(zip(names, await asyncio.gather(*opened), strict=True))


async def _all(tasks: Iterable[Any]) -> None:
    # Waits for every task before it raises: none may still be at work when the caller goes on.
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _is_plain(array: Any) -> bool:
    """Whether a chunk's file is the array's bytes and nothing else: numbers, uncompressed."""
    codecs = array.metadata.codecs
    return len(codecs) == 1 and isinstance(codecs[0], BytesCodec)


def _identical(cell: np.ndarray, value: np.ndarray) -> bool:
    # To the bit, so that NaN equals NaN and -0.0 does not equal 0.0.
    if cell.dtype.kind in "TO":
        return bool(np.all(cell == value))
    return cell.tobytes() == value.tobytes()


def _outline(steps: Sequence[int]) -> str:
    return f"{len(steps):,} from {steps[0]} to {steps[-1]}" if steps else "length unknown"
