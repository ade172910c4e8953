"""A comparison in the terminal: steps and ratios, what they cost, sweeps, findings, and what limits all that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from hessprobe.comparison.compared import Comparison
from hessprobe.comparison.findings import comparison_findings
from hessprobe.comparison.tables import COSTS, cost_rows, rate_rows, reference_label, step_rows, study_name
from hessprobe.report.terminal import ACCENT

WIDE = 100  # columns of a terminal that has room for the range over seeds
WORDS = ("method", "mark")  # columns that may wrap


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Prints a comparison; without a terminal, the same as plain aligned lines."""
    console.print(
        f"[bold {ACCENT}]steps to a held-out loss of {comparison.target:.6g}[/]  "
        f"{escape(comparison.target_basis)}",
        highlight=False,
    )
    console.print("the first evaluated step at or below it, counted from the run's first row", style="dim")
    reference = reference_label(comparison)
    columns = {"method": "method", "rate": "rate", "seeds": "seeds", "steps": "steps"}
    columns |= {"range": "least to most"} if console.width >= WIDE else {}
    columns |= {"ratio": "times"} if reference else {}
    _print_rows(console, columns | {"study": "study"}, step_rows(comparison))
    times = f"times: {reference}'s, ≈ where the two are not told apart; " if reference else ""
    console.print(escape(f"{times}study: {study_name('steps_to_loss')}"), style="dim", highlight=False)
    console.print("\nwhat it cost", highlight=False)
    _print_rows(console, {"method": "method", **COSTS}, cost_rows(comparison))
    if rates := rate_rows(comparison):
        console.print("\nlearning rates", highlight=False)
        names = {
            "method": "method",
            "rate": "rate",
            "seeds": "seeds",
            "steps": "steps",
            "lowest": "lowest loss",
        }
        _print_rows(console, names | {"mark": ""}, rates)
    for finding in comparison_findings(comparison):
        console.print(
            f"\n[{ACCENT}]•[/] {escape(finding.sentence)} [dim]({escape(finding.basis)})[/]", highlight=False
        )
    for caution in comparison.cautions:
        console.print(f"\n[yellow]![/] {escape(caution)}", highlight=False)
    if comparison.left_out:
        console.print("\nleft out", highlight=False)
    for run, reason in comparison.left_out.items():
        console.print(f"  {escape(run)}: {escape(reason)}", style="dim", highlight=False)


def _print_rows(console: Console, columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows as a table; where no table fits, each as its method and below it what is known of it."""
    widths = {
        key: max(len(text) for text in (name, *(row[key] for row in rows))) for key, name in columns.items()
    }
    needed = sum(min(width, 16) if key in WORDS else width for key, width in widths.items())
    if needed + 2 * (len(columns) - 1) > console.width:
        for row in rows:
            known = [f"{name} {row[key]}" for key, name in columns.items() if key != "method" and row[key]]
            console.print(escape(row["method"]), highlight=False)
            console.print(Padding(escape(",  ".join(known).strip()), (0, 0, 0, 2)), highlight=False)
        return
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for key, heading in columns.items():
        words = key in WORDS
        shown.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    for row in rows:
        shown.add_row(*(escape(row[key]) for key in columns))
    console.print(shown)
