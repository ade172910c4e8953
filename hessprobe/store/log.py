"""Where a run's log is, and whether this version can read it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import LocalStore

from hessprobe.errors import UserError
from hessprobe.schema.table import SCHEMA_VERSION
from hessprobe.store.attributes import portable

LOG = "log.zarr"
# What is being built lies here, on the same file system but outside the log, until one rename moves it in.
BUILDING = ".log.zarr.building"


class LogStore(LocalStore):
    """A folder of this machine to read from, whatever it is called: a path given as text may be taken for a URL.

    fsspec splits names at "::" and "://". dask names what it reads by the store, and a log that has grown is another.
    """

    def __dask_tokenize__(self) -> tuple[str, str, int]:
        return type(self).__name__, str(self.root), self.root.stat().st_mtime_ns


def create_log(folder: Path, attributes: Mapping[str, object]) -> None:
    """Makes folder/log.zarr, a root group with the attributes and schema version; UserError if it exists."""
    log, building = folder / LOG, folder / BUILDING / LOG
    if log.exists():
        raise UserError(f"{folder} already holds a run; continue it with --resume, or give another folder")
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    zarr.create_group(
        LocalStore(building), attributes={**portable(attributes), "schema_version": SCHEMA_VERSION}
    )
    try:
        os.rename(building, log)
    except OSError as error:
        # Another process made one meanwhile: a directory that is not empty is never renamed over.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"another process is just making a run in {folder}; give another folder") from error


def find_log(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the log.zarr of a run (given its folder or the log itself) and its root attributes.

    UserError if there is no run, the root is torn, the store is not ours, or a newer hessprobe wrote it.
    """
    if not path.exists():
        near = sorted(log.parent.name for log in path.absolute().parent.glob(f"*/{LOG}"))
        hint = f"{path.parent} holds: {', '.join(near)}" if near else f"{path.parent} holds no run"
        raise UserError(f"no run at {path}: there is no such folder; {hint}")
    log = path / LOG if (path / LOG).is_dir() else path
    if log is path and not (path.is_dir() and (path.name == LOG or (path / "zarr.json").exists())):
        within = sorted(log.parent.name for log in path.glob(f"*/{LOG}")) if path.is_dir() else []
        what = "it is not a folder" if not path.is_dir() else f"the folder holds no {LOG}"
        hint = (
            f"; runs in it: {', '.join(within)}" if within else "; give the folder that a run was written to"
        )
        raise UserError(f"no run at {path}: {what}{hint}")
    if not (log / "zarr.json").is_file():
        raise UserError(
            f"{log} is torn: its zarr.json is missing; copy the run again from where it was recorded"
        )
    try:
        attributes = dict(
            zarr.open_group(LogStore(log, read_only=True), mode="r", use_consolidated=False).attrs
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{log} is torn: its zarr.json cannot be read ({error}); copy the run again"
        ) from error
    version = attributes.get("schema_version")
    if not isinstance(version, int):
        raise UserError(f"{log} is a zarr store but no log of hessprobe: it carries no schema_version")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{log} has schema version {version}; this hessprobe reads up to version {SCHEMA_VERSION}. "
            "Update hessprobe (pip install -U hessprobe)"
        )
    return log, attributes


def table_names(log: Path) -> tuple[str, ...]:
    """The tables of a log, sorted. UserError for one whose zarr.json is missing."""
    names = sorted(entry.name for entry in log.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if not (log / name / "zarr.json").is_file():
            raise UserError(f"{log / name} is torn: its zarr.json is missing; copy the run again")
    return tuple(names)
