"""The waist of the package: labelled tables in, zarr on disk, xarray out; nothing here needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hessprobe.schema.table import SCHEMA_VERSION, Table, Variable

if TYPE_CHECKING:
    from hessprobe.store.reader import open_run, recorded_probes, require_table
    from hessprobe.store.writer import RunWriter

__all__ = [
    "SCHEMA_VERSION",
    "RunWriter",
    "Table",
    "Variable",
    "open_run",
    "recorded_probes",
    "require_table",
]


def __getattr__(name: str) -> object:
    # Loaded on first use: a probe that only declares a table does not pay for zarr and xarray (1.6 s).
    if name == "RunWriter":
        from hessprobe.store import writer

        return writer.RunWriter
    if name in ("open_run", "recorded_probes", "require_table"):
        from hessprobe.store import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
