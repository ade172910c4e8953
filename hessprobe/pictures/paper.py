"""What figures for a paper share: one style, column width, text that stays text in PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import xarray as xr
from matplotlib.figure import Figure

from hessprobe.store.reader import require_table

COLUMN = 3.35  # inches: one column of a two-column page


ACCENT, SECOND = "#0b6a88", "#b35806"


STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # embeds the font: text in the PDF can be searched and edited
    "savefig.dpi": 300,
}


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PDF and PNG into a folder, made where missing, and returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    with matplotlib.rc_context(STYLE):
        for path in paths:
            figure.savefig(path)
    return paths


def stored(run: xr.DataTree, name: str) -> xr.Dataset:
    """Returns one table of a run; UserError if it has none such."""
    return require_table(run, name)


def new(height: float):
    """Returns a figure of one column's width and its axes."""
    # Figure itself, not pyplot: pyplot keeps every figure alive in a global list.
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.add_subplot()


def plain(name: str) -> str:
    """Returns a name without matplotlib's math: a dollar sign would start a formula."""
    return name.replace("$", r"\$")


def short(name: str) -> str:
    """Returns a block's name as a tick can show it."""
    return plain(name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}")


def marker(points: int) -> str:
    """Returns the marker of a line: none where there are many points."""
    return "o" if points <= 60 else ""
