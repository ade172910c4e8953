"""A run's tables in the terminal: where training stands, and what the last measured row says of layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hessprobe.instruments.cross_layer.answers import coupling, cross_share, strongest_pairs
from hessprobe.instruments.gn_hessian.terminal import show_gn_hessian
from hessprobe.instruments.preconditioner.terminal import show_preconditioner
from hessprobe.reading.load_run import load_run
from hessprobe.reading.rows import failed_rows, sound_rows
from hessprobe.reading.wording import basis, counted, percent, plus_minus
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
            _show_cross_layer(table, console)
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


def _show_cross_layer(table: xr.Dataset, console: Console) -> None:
    """Prints the last measured row: coupling of every pair with errors, shares between layers, cost."""
    rows = coupling(table)
    if rows.sizes["step"] == 0:
        console.print("no row holds a number")
        return
    row = rows.isel(step=-1)
    whole = table.sel(step=int(row["step"])).load()
    console.print(f"step {int(row['step'])}  {basis(whole)}", highlight=False)
    for part in _matrix(row, console.width) if row.sizes["block"] <= 16 else [_pairs(row)]:
        console.print(part)
    facts = []
    if "off_block_energy" in whole:
        energy, error = float(whole["off_block_energy"]), float(whole["off_block_energy_stderr"])
        facts.append(f"off-block energy  {percent(energy, error)}")
    if sound_rows(table, "step_curvature").sizes["step"]:
        shares = cross_share(whole["step_curvature"])
        facts += [
            f"cross share along {str(direction).replace('_', ' ')}  "
            f"{percent(float(shares.sel(direction=direction)))}"
            for direction in shares["direction"].values
        ]
    facts.append(
        f"cost  {plus_minus(float(whole['seconds']), None, 's')}, "
        f"{plus_minus(float(whole['gradient_equivalents']), None, 'gradient equivalents')}"
    )
    for fact in facts:
        console.print(fact, highlight=False, markup=False)


def _matrix(row: xr.Dataset, width: int) -> list[Table]:
    """Returns the coupling of every pair with its error; where that is too wide, bare values and ranks."""
    names = [escape(str(name)) for name in row["block"].values]
    values, errors = row["coupling"].values, row["coupling_stderr"].values
    cells = [
        [plus_minus(float(values[i, j]), float(errors[i, j])) if j > i else "" for j in range(len(names))]
        for i in range(len(names))
    ]
    widths = [
        max(len(names[j]), *(len(row_cells[j]) for row_cells in cells)) + 2 for j in range(1, len(names))
    ]
    fits = sum(widths) + max(len(name) for name in names) <= width
    shown = Table(box=None, pad_edge=False, header_style="dim", title="coupling", title_justify="left")
    shown.add_column("")
    for j, name in enumerate(names[1:], start=1):
        shown.add_column(name if fits else str(j), justify="right", no_wrap=True)
    for i, name in enumerate(names if not fits else names[:-1]):
        numbers = (
            cells[i]
            if fits
            else [f"{values[i, j]:.2f}".replace("0.", ".", 1) if j > i else "" for j in range(len(names))]
        )
        shown.add_row(name if fits else f"{i} {name}", *numbers[1:])
    return [shown] if fits else [shown, _pairs(row)]


def _pairs(row: xr.Dataset) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim", title="strongest pairs", title_justify="left")
    for heading in ("block", "other block", "coupling"):
        shown.add_column(heading, justify="left" if heading != "coupling" else "right")
    pairs = strongest_pairs(row, count=16)
    for i in range(pairs.sizes["pair"]):
        names = (escape(str(pairs[side].values[i])) for side in ("block", "other_block"))
        shown.add_row(
            *names, plus_minus(float(pairs["coupling"].values[i]), float(pairs["coupling_stderr"].values[i]))
        )
    return shown
