"""The table `cross_layer` in the terminal: what the last measured row says of layers."""

from __future__ import annotations

import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.reading.wording import basis, percent, plus_minus

MATRIX_UP_TO = 16  # blocks
PAIRS_SHOWN = 16


def show(answers: CrossLayerAnswers, console: Console) -> None:
    """Prints the last measured row: coupling of every pair with errors, shares between layers, cost."""
    pairs = answers.strongest_pairs
    if pairs is None:
        console.print("no row holds a number")
        return
    row, whole = answers.coupling.isel(step=-1), answers.measured.isel(step=-1)
    console.print(f"step {int(row['step'])}  {basis(whole)}", highlight=False)
    few = row.sizes["block"] <= MATRIX_UP_TO
    for part in _matrix(row, pairs, console.width) if few else [_pairs(pairs)]:
        console.print(part)
    facts = []
    if "off_block_energy" in whole:
        energy, error = float(whole["off_block_energy"]), float(whole["off_block_energy_stderr"])
        facts.append(f"off-block energy  {percent(energy, error)}")
    if answers.cross_share is not None:
        shares = answers.cross_share.reindex(step=[int(row["step"])]).isel(step=0)
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


def _matrix(row: xr.Dataset, pairs: xr.Dataset, width: int) -> list[Table]:
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
    return [shown] if fits else [shown, _pairs(pairs)]


def _pairs(pairs: xr.Dataset) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim", title="strongest pairs", title_justify="left")
    for heading in ("block", "other block", "coupling"):
        shown.add_column(heading, justify="left" if heading != "coupling" else "right")
    for i in range(min(PAIRS_SHOWN, pairs.sizes["pair"])):
        names = (escape(str(pairs[side].values[i])) for side in ("block", "other_block"))
        shown.add_row(
            *names, plus_minus(float(pairs["coupling"].values[i]), float(pairs["coupling_stderr"].values[i]))
        )
    return shown
