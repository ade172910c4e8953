"""A run's tables in the terminal: where training stands, and what the last measured row says of layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hessprobe.instruments.cross_layer.terminal import show_cross_layer
from hessprobe.instruments.gn_hessian.terminal import show_gn_hessian
from hessprobe.instruments.preconditioner.terminal import show_preconditioner
from hessprobe.reading.load_run import load_run
from hessprobe.reading.rows import failed_rows
from hessprobe.reading.wording import counted
from hessprobe.report.findings import findings
from hessprobe.store.reader import require_table

TRAIN_COLUMNS = ("loss", "held_out_loss", "step_size", "gradient_norm", "tokens", "seconds")
ACCENT = "cyan"


def show(run: Path, console: Console, tables: Sequence[str] = (), limit: int = 6) -> None:
    """Prints a run's tables, or only those named; without a terminal, the same as plain aligned lines.

    Args:
        run: the run's folder.
        console: where to print.
        tables: names of tables; default all that the run holds.
        limit: rows shown from each end of a table; blocks beyond 16 give the strongest pairs, not a matrix.

    Raises:
        UserError: no run there, a newer version wrote it, it is damaged, or it holds no table of a given name.
    """
    tree = load_run(run)
    wanted = list(tables) or sorted(tree.children, key=lambda name: (name != "train", name))
    opened = {
        name: require_table(tree, name) for name in wanted
    }  # a wrong name must not leave half an answer
    title = str(tree.attrs.get("name") or run.resolve().name)
    console.print(f"[bold {ACCENT}]{escape(title)}[/]  {escape(str(tree.attrs.get('device', '')))}")
    if not opened:
        console.print("no tables recorded yet")
    for name, table in opened.items():
        recorded = counted(table.sizes["step"], "row")
        console.print(f"\n[bold]{escape(name)}[/]  {recorded}", highlight=False)
        if table.sizes["step"] == 0:
            console.print("nothing recorded yet")
        elif name == "cross_layer":
            show_cross_layer(table, console)
        elif name == "gn_hessian":
            show_gn_hessian(table, console)
        elif name == "preconditioner":
            show_preconditioner(table, console)
        else:
            columns = TRAIN_COLUMNS if name == "train" else tuple(str(v) for v in table if table[v].ndim == 1)
            console.print(_ends(table, [column for column in columns if column in table], limit))
        for step, reason in failed_rows(table).items():
            console.print(f"step {step} failed: {escape(reason)}", style="yellow", highlight=False)
    if not tables:
        for finding in findings(tree):
            console.print(
                f"\n[{ACCENT}]•[/] {escape(finding.sentence)} [dim]({escape(finding.basis)})[/]",
                highlight=False,
            )


def _ends(table: xr.Dataset, columns: Sequence[str], limit: int) -> Table:
    """Returns the first and last rows of a table's scalar columns."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", *columns):
        shown.add_column(column, justify="right")
    count = table.sizes["step"]
    whole = count <= 2 * limit
    kept = np.arange(count) if whole else np.r_[np.arange(limit), np.arange(count - limit, count)]
    rows = table[list(columns)].isel(step=kept).compute()
    for i in range(rows.sizes["step"]):
        if i == limit and not whole:
            shown.add_row(*["…"] * (len(columns) + 1))
        cells = [_cell(rows[column].values[i]) for column in columns]
        shown.add_row(str(int(rows["step"].values[i])), *cells)
    return shown


def _cell(value) -> str:
    if isinstance(value, str):
        return escape(value)
    number = float(value)
    if not np.isfinite(number):
        return "-"
    return f"{int(number):,}" if number.is_integer() and abs(number) >= 100 else f"{number:.4g}"
