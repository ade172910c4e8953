"""Any table in the terminal: the scalars of its first and last rows."""

from __future__ import annotations

from rich.console import Console

from hessprobe.instruments.generic.answers import StoredScalars
from hessprobe.pictures.terminal import first_and_last


def first_and_last_rows(answers: StoredScalars, console: Console) -> None:
    """Prints the first and last rows of a table's single numbers and words."""
    table = answers.table
    console.print(first_and_last(table, [str(name) for name in table if table[name].ndim == 1]))
