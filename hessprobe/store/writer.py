"""How a run is logged: lay out its tables, then record row by row; kill -9 loses the row in hand at most.

Every table is whole on disk before its first row (store.layout); a row's mark is written last (store.rows).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hessprobe.errors import UserError
from hessprobe.schema.table import Table
from hessprobe.store import layout
from hessprobe.store.lock import RunLock
from hessprobe.store.log import create_log, find_log, table_names
from hessprobe.store.rows import TableRows


class RunWriter:
    """Writes the log of one run: `create` or `reopen`, `add_table`, then `write` a row at a time.

    A row is durable when `write` returns: it survives kill -9 of the process (a power cut is the file
    system's affair). One writer a run, any number of readers meanwhile. A row of 16 numbers costs 1-2 ms.
    A plain xr.open_zarr that straddles the growth of a table of unknown length (milliseconds, ever more
    seldom) finds two lengths and raises; opening again works, and `open_run` does so by itself.
    """

    def __init__(self, folder: Path, lock: RunLock) -> None:
        """Not for callers: see `create` and `reopen`."""
        self.folder = folder
        self._lock = lock
        self._tables: dict[str, TableRows] = {}
        self._closed = False

    @classmethod
    def create(cls, folder: Path | str, attributes: Mapping[str, object]) -> RunWriter:
        """Makes folder/log.zarr with the run's attributes. UserError if the folder already holds a run."""
        folder = Path(folder)
        lock = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder)
            create_log(folder, attributes)
        except BaseException as error:
            if lock is not None:
                layout.clear_building(folder)
                lock.release()
            if isinstance(error, OSError):
                raise UserError(
                    f"cannot write a run to {folder} ({error.strerror}): nothing was recorded. "
                    "Free some space there, or give another folder"
                ) from error
            raise
        return cls(folder.absolute(), lock)  # the working directory may move before the next row

    @classmethod
    def reopen(cls, folder: Path | str) -> RunWriter:
        """Continues the log in folder, whatever ended the process before; UserError if there is none."""
        log, _ = find_log(Path(folder).absolute())
        folder = log.parent
        lock = RunLock(folder)
        try:
            layout.restore(folder)
            layout.clear_building(folder)
            writer = cls(folder, lock)
            for name in table_names(log):
                writer._tables[name] = TableRows(folder, name)
        except BaseException:
            lock.release()
            raise
        return writer

    @property
    def attributes(self) -> dict[str, Any]:
        """The run's attributes as they stand on disk."""
        return find_log(self.folder)[1]

    def add_table(self, table: Table, steps: Sequence[int] | None) -> None:
        """Lays out a table for `steps`, or one that grows if they are not known (None).

        In a reopened run the table is the one on disk: UserError if it differs; `steps` may go on further.
        """
        self._check_open()
        if steps is not None and (len(set(steps)) != len(steps) or any(step < 0 for step in steps)):
            raise ValueError(f"table {table.name!r}: steps must be distinct and not negative")
        with self._kept(f"table {table.name!r} was not laid out"):
            if table.name not in self._tables:
                layout.create_table(self.folder, table, steps)
                self._tables[table.name] = TableRows(self.folder, table.name)
            else:
                self._tables[table.name].continue_as(table, steps)

    def write(self, table: str, step: int, row: Mapping[str, Any]) -> None:
        """Records one row, all variables of the table; a row of the same step is replaced.

        ValueError for an unknown table, step or variable, or a value of the wrong shape (a mistake in the
        program); UserError if the disk is full, with everything recorded before kept.
        """
        self._put(table, step, self._table(table).checked(row), "")

    def fail(self, table: str, step: int, reason: str) -> None:
        """Records that the row could not be measured: its data are NaN, its `failure` is the reason."""
        self._put(table, step, self._table(table).empty_row(), reason or "no reason given")

    def annotate(self, attributes: Mapping[str, str]) -> None:
        """Adds attributes of the run to the log's root; one of the same name is replaced."""
        self._check_open()
        with self._kept(f"the attributes {', '.join(attributes)} were not written"):
            layout.annotate_log(self.folder, attributes)

    def recorded_steps(self, table: str) -> list[int]:
        """The steps a table holds a whole row of (failed ones too), in the order of its rows."""
        return self._table(table).recorded_steps()

    def close(self) -> None:
        """Ends the writing; nothing is pending, so a process that dies without it loses nothing."""
        if not self._closed:
            self._closed = True
            layout.clear_building(self.folder)
            self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(self, table: str, step: int, row: Mapping[str, np.ndarray], failure: str) -> None:
        with self._kept(f"step {step} of table {table!r} was not recorded"):
            self._table(table).put(int(step), row, failure)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the writer of {self.folder} is closed; RunWriter.reopen continues the run")

    def _table(self, name: str) -> TableRows:
        self._check_open()
        if name not in self._tables:
            raise ValueError(
                f"no table {name!r} in {self.folder}; it has: {', '.join(self._tables) or 'none'}"
            )
        return self._tables[name]

    @contextmanager
    def _kept(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            rows = sum(len(table.recorded_steps()) for table in self._tables.values())
            raise UserError(
                f"no space left on disk for {self.folder}: {what}; the {rows:,} rows recorded before "
                "are kept. Free some space and go on with --resume"
            ) from error
