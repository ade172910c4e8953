"""`hessprobe report`, `show` and `compare`: what logs hold, as pages, figures and tables in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hessprobe.errors import UserError


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run's folder; several stand side by side.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; default RUN/report.html, for several beside the first.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write all figures, PDF and PNG, into this folder."),
    ] = None,
) -> None:
    """Write one self-contained page from logs; works while a run is still going on."""
    if len(runs) == 1:
        print(f"report   {_write_page(runs[0], out)}")
    else:
        print(f"report   {_write_runs_page(runs, out)}")
    if figures is not None:
        _write_figures(runs, figures)


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/nano.")],
) -> None:
    """Print a run's tables in the terminal."""
    from rich.console import Console

    from hessprobe.report.terminal import show as print_tables

    print_tables(run, Console())


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs' folders, or folders that contain runs."),
    ],
    target: Annotated[
        float | None,
        typer.Option(help="Held-out loss, nats per token; default the lowest that every run reached."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write figures, PDF and PNG, into this folder.")
    ] = None,
) -> None:
    """Say how many steps, tokens, seconds and gradients each method needs to reach a loss."""
    from rich.console import Console

    from hessprobe.comparison.compared import compare as compared
    from hessprobe.comparison.terminal import show_comparison

    comparison = compared(runs, target)
    show_comparison(comparison, Console())
    try:
        if figures is not None:
            from hessprobe.comparison.pictures import save_figures

            for path in save_figures(comparison, figures):
                print(f"figure   {path}")
        if out is not None:
            from hessprobe.comparison.page import write_comparison

            print(f"report   {write_comparison(comparison, out)}")
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out or figures} ({error.strerror or error}); give another --out or "
            "--figures, or free some space"
        ) from error


def say_written(folder: Path) -> None:
    """Writes a run's page, and says where log and page are and what comes next."""
    page = _write_page(folder)
    print(f"log      {folder / 'log.zarr'}")
    print(f"report   {page}")
    print(f"next     hessprobe show {folder}")


def _write_page(run: Path, out: Path | None = None) -> Path:
    from hessprobe.report.page import write_report

    try:
        return write_report(run, out)
    except OSError as error:
        raise UserError(
            f"cannot write the report of {run} ({error.strerror or error}); its log is kept. Free some space, or write "
            f"it elsewhere: hessprobe report {run} --out FILE"
        ) from error


def _write_runs_page(runs: list[Path], out: Path | None) -> Path:
    from hessprobe.report.several_runs import write_runs_report

    try:
        return write_runs_report(runs, out)
    except OSError as error:
        raise UserError(
            f"cannot write the report of {len(runs)} runs ({error.strerror or error}); write it elsewhere: --out FILE"
        ) from error


def _write_figures(runs: list[Path], folder: Path) -> None:
    from hessprobe.analysis import load_run
    from hessprobe.reading.labelled import labels
    from hessprobe.report.figure_set import save_figures

    for run, label in zip(runs, labels(runs), strict=True):
        try:
            found = save_figures(load_run(run), folder, prefix="" if len(runs) == 1 else f"{label}-")
        except OSError as error:
            raise UserError(
                f"cannot write figures into {folder} ({error.strerror or error}); give another --figures DIR"
            ) from error
        for path in found.written:
            print(f"figure   {path}")
        for name, reason in found.left_out.items():
            print(f"no figure {name}: {reason}", file=sys.stderr)
