"""The table `gn_hessian` in the terminal: its last measured row, whole, by block and along directions."""

from __future__ import annotations

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION, full_length
from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON, HESSIAN
from hessprobe.instruments.gn_hessian.step_findings import ALONG
from hessprobe.reading.wording import percent, plus_minus


def show(answers: GNHessianAnswers, console: Console) -> None:
    """Prints the last measured row: gap, cosine, traces and extremes, blocks, directions, and the two errors of a step."""
    if answers.gap.sizes["step"] == 0:
        console.print("no row holds a number")
        return
    row = answers.gap.isel(step=-1)
    step = int(row["step"])
    console.print(f"step {step}  {answers.basis(step)}", highlight=False)
    gap, cosine = (plus_minus(float(row[n]), float(row[f"{n}_stderr"])) for n in ("gn_gap", "cosine"))
    console.print(f"|H - G| / |G|  {gap}    cosine  {cosine}", highlight=False, markup=False)
    for ask in (_matrices, _blocks, _directions, _errors):
        part = ask(answers, step)
        if part is not None:
            console.print(part)


def _matrices(answers: GNHessianAnswers, step: int) -> Table:
    """Returns trace and extreme eigenvalues of G and H."""
    shown = _table("", "trace", "largest ± residual", "smallest ± residual")
    trace, ends = _at(answers.traces, step), _at(answers.extremes, step)
    for name, label in ((GAUSS_NEWTON, "G"), (HESSIAN, "H")):
        cells = [
            plus_minus(float(row[n].sel(matrix=name)), float(row[error].sel(matrix=name)))
            if row is not None
            else "not measured"
            for row, n, error in (
                (trace, "trace", "trace_stderr"),
                (ends, "lambda_max", "lambda_max_residual"),
                (ends, "lambda_min", "lambda_min_residual"),
            )
        ]
        shown.add_row(label, *cells)
    return shown


def _blocks(answers: GNHessianAnswers, step: int) -> Table | None:
    row = _at(answers.block_gap, step)
    if row is None:
        return None
    shown = _table("block", "|H - G| / |G|", "cosine")
    for block in row["block"].values:
        at = row.sel(block=block)
        cells = (plus_minus(float(at[n]), float(at[f"{n}_stderr"])) for n in ("gn_gap", "cosine"))
        shown.add_row(escape(str(block)), *cells)
    return shown


def _directions(answers: GNHessianAnswers, step: int) -> Table | None:
    row = _at(answers.directions, step)
    if row is None:
        return None
    shown = _table("along", "d.Gd / |d|2", "d.Hd / |d|2", "ratio")
    for name in row["direction"].values:
        at = row.sel(direction=name)
        curvature = at["direction_curvature"]
        numbers = (curvature.sel(matrix=GAUSS_NEWTON), curvature.sel(matrix=HESSIAN), at["ratio"])
        shown.add_row(escape(ALONG.get(str(name), str(name))), *(plus_minus(float(n), None) for n in numbers))
    return shown


def _errors(answers: GNHessianAnswers, step: int) -> Table | None:
    row = _at(answers.ladder, step)
    if row is None or not np.isfinite(row[LINEARISATION].values).any():
        return None
    row = row.sel(alpha=full_length(row))
    shown = _table("nats per token", "linearising", "higher orders", "share")
    for name in row["ladder_direction"].values:
        at = row.sel(ladder_direction=name)
        numbers = [plus_minus(float(at[n]), float(at[f"{n}_stderr"])) for n in (LINEARISATION, BEYOND)]
        share = percent(float(at["share"]), float(at["share_stderr"]))
        shown.add_row(escape(ALONG.get(str(name), str(name))), *numbers, share)
    return shown


def _at(rows: xr.Dataset, step: int) -> xr.Dataset | None:
    """Returns the row of a step; None where it holds no such numbers."""
    return rows.sel(step=step) if step in rows["step"].values else None


def _table(*headings: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if i else "left")
    return shown
