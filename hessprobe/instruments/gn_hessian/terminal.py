"""The table `gn_hessian` in the terminal: its last measured row, whole, by block and along directions."""

from __future__ import annotations

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hessprobe.instruments.gn_hessian.answers import (
    GAUSS_NEWTON,
    HESSIAN,
    block_gap,
    curvature_ratio,
    gn_gap,
    measured,
    traces,
)
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION, full_length, ladder
from hessprobe.instruments.gn_hessian.spectrum import extremes
from hessprobe.instruments.gn_hessian.step_findings import ALONG
from hessprobe.reading.wording import basis, percent, plus_minus


def show_gn_hessian(table: xr.Dataset, console: Console) -> None:
    """Prints the last measured row: gap, cosine, traces and extremes, blocks, directions, and the two errors of a step."""
    rows = gn_gap(table)
    if rows.sizes["step"] == 0:
        console.print("no row holds a number")
        return
    row, step = rows.isel(step=-1), int(rows["step"][-1])
    console.print(f"step {step}  {basis(table.sel(step=step), exact=True)}", highlight=False)
    gap, cosine = (plus_minus(float(row[n]), float(row[f"{n}_stderr"])) for n in ("gn_gap", "cosine"))
    console.print(f"|H - G| / |G|  {gap}    cosine  {cosine}", highlight=False, markup=False)
    console.print(_matrices(table.sel(step=[step])))
    for ask in (_blocks, _directions, _errors):
        part = ask(table.sel(step=[step]))
        if part is not None:
            console.print(part)


def _matrices(table: xr.Dataset) -> Table:
    """Returns trace and extreme eigenvalues of G and H."""
    shown = _table("", "trace", "largest ± residual", "smallest ± residual")
    trace, ends = traces(table), extremes(table)
    for name, label in ((GAUSS_NEWTON, "G"), (HESSIAN, "H")):
        cells = [
            plus_minus(float(rows[n].sel(matrix=name)[-1]), float(rows[error].sel(matrix=name)[-1]))
            if rows.sizes["step"]
            else "not measured"
            for rows, n, error in (
                (trace, "trace", "trace_stderr"),
                (ends, "lambda_max", "lambda_max_residual"),
                (ends, "lambda_min", "lambda_min_residual"),
            )
        ]
        shown.add_row(label, *cells)
    return shown


def _blocks(table: xr.Dataset) -> Table | None:
    rows = block_gap(table)
    if rows.sizes["step"] == 0:
        return None
    shown, row = _table("block", "|H - G| / |G|", "cosine"), rows.isel(step=-1)
    for block in row["block"].values:
        at = row.sel(block=block)
        cells = (plus_minus(float(at[n]), float(at[f"{n}_stderr"])) for n in ("gn_gap", "cosine"))
        shown.add_row(escape(str(block)), *cells)
    return shown


def _directions(table: xr.Dataset) -> Table | None:
    rows = measured(table, "direction_curvature")
    if rows.sizes["step"] == 0:
        return None
    shown = _table("along", "d.Gd / |d|2", "d.Hd / |d|2", "ratio")
    row, ratio = rows["direction_curvature"].isel(step=-1), curvature_ratio(table).isel(step=-1)
    for name in row["direction"].values:
        at = row.sel(direction=name)
        numbers = (at.sel(matrix=GAUSS_NEWTON), at.sel(matrix=HESSIAN), ratio.sel(direction=name))
        shown.add_row(escape(ALONG.get(str(name), str(name))), *(plus_minus(float(n), None) for n in numbers))
    return shown


def _errors(table: xr.Dataset) -> Table | None:
    rows = ladder(table)
    if rows.sizes["step"] == 0 or not np.isfinite(rows[LINEARISATION].values).any():
        return None
    row = rows.isel(step=-1).sel(alpha=full_length(rows))
    shown = _table("nats per token", "linearising", "higher orders", "share")
    for name in row["ladder_direction"].values:
        at = row.sel(ladder_direction=name)
        numbers = [plus_minus(float(at[n]), float(at[f"{n}_stderr"])) for n in (LINEARISATION, BEYOND)]
        share = percent(float(at["share"]), float(at["share_stderr"]))
        shown.add_row(escape(ALONG.get(str(name), str(name))), *numbers, share)
    return shown


def _table(*headings: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if i else "left")
    return shown
