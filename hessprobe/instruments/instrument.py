"""What an instrument is: a declared table, a probe that fills it, and the ways in which its rows are read.

Everything is named, and loaded when it is used first: settings are checked without xarray, logs are read without torch.
The defaults read any table, so that settings, table and probe are a whole instrument.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hessprobe.schema.section import Section
from hessprobe.schema.table import Table

GENERIC = "hessprobe.instruments.generic"
STDERR = "_stderr"

# "package.module:name", or the thing itself.
Named = str | Callable[..., Any]


def loaded(named: Named) -> Any:
    """Returns what "package.module:name" names; anything else is itself."""
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A finding's number in which several runs are compared.

    Attributes:
        name: the finding's.
        words: what the number is.
        share: whether it is written in percent, and a difference in percentage points.
        alike: what the numbers of two runs must share to be compared, a function of the recorded table; None for nothing.
    """

    name: str
    words: str
    share: bool = False
    alike: Named | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Instrument:
    """An instrument: `settings`, `table` and `probe` make a row; the other fields say how rows are read.

    Attributes:
        name: of the table, of the section of a recipe, and of `--probe`.
        title: of its section on the page.
        settings: its section of a recipe, with `every` and `sequences`; None where no probe fills the table.
        table: (settings, names of blocks) -> the table's layout.
        probe: the `Probe` made from settings; "" where no probe fills the table.
        headline: (row) -> the console's words on a row.
        answers: (recorded table) -> what it answers; each question is computed once.
        findings: (answers) -> sentences, most important first.
        pictures: (labelled runs) -> all pictures, of one run or several.
        content: (labelled runs) -> what the page's template takes, with what its slider takes as `frames`.
        template: of one run's section on the page.
        several_template: of several runs'.
        show: (answers, console) -> prints a table in a terminal.
        anchor: of its section in the page's address; default the name.
        compared_at: the variable whose measured steps decide up to which step runs are compared; "" compares all rows.
        agree: (labelled runs) -> the same, where answers of several runs need one setting in common.
        compared: the numbers in which several runs are compared; None: every scalar declared with an error.
        recorded_by: the command that records the table; default `hessprobe train --probe NAME`.
    """

    name: str
    title: str
    settings: type[Section] | None = None
    table: Named
    probe: Named = ""
    headline: Named = f"{GENERIC}.headline:scalars"
    answers: Named = f"{GENERIC}.answers:StoredScalars"
    findings: Named = f"{GENERIC}.findings:trends_of_scalars"
    pictures: Named = f"{GENERIC}.pictures:lines_and_heatmaps"
    content: Named = f"{GENERIC}.section:content"
    template: str = "generic/section.html.j2"
    several_template: str = "generic/section.html.j2"
    show: Named = f"{GENERIC}.terminal:first_and_last_rows"
    anchor: str = ""
    compared_at: str = ""
    agree: Named | None = None
    compared: tuple[Quantity, ...] | None = None
    recorded_by: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name):
            raise ValueError(f"instrument {self.name!r}: a name of letters, digits and _ is wanted")
        if bool(self.probe) != (self.settings is not None):
            raise ValueError(f"instrument {self.name!r}: a probe needs settings, and settings a probe")

    @property
    def section_id(self) -> str:
        """The id of its section on the page."""
        return self.anchor or self.name

    @property
    def recorded_with(self) -> str:
        """The command that records its table."""
        return self.recorded_by or f"hessprobe train --probe {self.name}"

    def layout(self, blocks: Sequence[str], settings: Section | None = None) -> Table:
        """Returns the layout of its table for these blocks; default settings where none are given."""
        return loaded(self.table)(settings or (self.settings() if self.settings else None), tuple(blocks))

    def quantities(self) -> tuple[Quantity, ...]:
        """Returns the numbers in which several runs are compared."""
        if self.compared is not None:
            return self.compared
        scalars = {v.name: v for v in self.layout(("block",)).variables if len(v.dims) == 1}
        return tuple(
            Quantity(name=f"{self.name}.{name}", words=variable.long_name)
            for name, variable in scalars.items()
            if name + STDERR in scalars
        )
