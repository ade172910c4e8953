"""What a table of any instrument answers: its stored numbers, each with its error, units and words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from hessprobe.instruments.generic.headline import OF_EVERY_ROW
from hessprobe.instruments.instrument import STDERR
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.wording import basis

STEP = "step"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A stored quantity on the rows that hold it.

    Attributes:
        name: the variable's.
        words: its long name.
        units: "" for a pure number.
        values: (step, ...), labelled.
        stderr: of the same shape, or None.
    """

    name: str
    words: str
    units: str
    values: xr.DataArray
    stderr: xr.DataArray | None

    @property
    def steps(self) -> np.ndarray:
        """The measured steps."""
        return self.values[STEP].values


class StoredScalars:
    """The stored numbers of one table, by how many dimensions a row of them has.

    Args:
        table: as recorded; its attribute `table` is the table's name.
    """

    def __init__(self, table: xr.Dataset) -> None:
        self.table = table
        self.name = str(table.attrs.get("table", "table"))

    @cached_property
    def scalars(self) -> dict[str, Stored]:
        """Quantities of one number a row."""
        return {each.name: each for each in self._of(0)}

    @cached_property
    def vectors(self) -> dict[str, Stored]:
        """Quantities of one number for each label of a dimension."""
        return {each.name: each for each in self._of(1)}

    @cached_property
    def matrices(self) -> dict[str, Stored]:
        """Quantities of one number for each pair of labels."""
        return {each.name: each for each in self._of(2)}

    @cached_property
    def basis(self) -> str:
        """What the last row rests on, in words."""
        return basis(self.table.isel(step=-1)) if self.table.sizes[STEP] else ""

    def _of(self, dims: int) -> Iterator[Stored]:
        for name in map(str, self.table.data_vars):
            variable = self.table[name]
            numbers = variable.dtype.kind in "fiu" and variable.dims[:1] == (STEP,)
            if not numbers or variable.ndim != 1 + dims or name in OF_EVERY_ROW or name.endswith(STDERR):
                continue
            rows = sound_rows(self.table, name)
            if rows.sizes[STEP] == 0:
                continue
            error = rows.get(name + STDERR)
            units = str(variable.attrs.get("units", ""))
            yield Stored(
                name=name,
                words=str(variable.attrs.get("long_name") or name.replace("_", " ")),
                units="" if units == "1" else units,
                values=rows[name].astype(float).compute(),
                stderr=None if error is None else error.astype(float).compute(),
            )
