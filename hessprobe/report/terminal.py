"""A run's tables in the terminal: where training stands, and what the last measured row of each instrument says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from hessprobe.instruments.instrument import loaded
from hessprobe.instruments.registry import EVERY_RUN, reader_of
from hessprobe.reading.load_run import load_run
from hessprobe.reading.rows import failed_rows
from hessprobe.reading.wording import counted
from hessprobe.report.asking import ask
from hessprobe.report.findings import findings_of
from hessprobe.store.reader import require_table

ACCENT = "cyan"


def show(run: Path, console: Console, tables: Sequence[str] = ()) -> None:
    """Prints a run's tables, or only those named; without a terminal, the same as plain aligned lines.

    Args:
        run: the run's folder.
        console: where to print.
        tables: names of tables; default all that the run holds.

    Raises:
        UserError: no run there, a newer version wrote it, it is damaged, or it holds no table of a given name.
    """
    tree = load_run(run)
    wanted = list(tables) or sorted(tree.children, key=lambda name: (name != EVERY_RUN, name))
    # A wrong name must not leave half an answer.
    opened = {name: require_table(tree, name) for name in wanted}
    title = str(tree.attrs.get("name") or run.resolve().name)
    console.print(f"[bold {ACCENT}]{escape(title)}[/]  {escape(str(tree.attrs.get('device', '')))}")
    if not opened:
        console.print("no tables recorded yet")
    asked = ask([tree])
    for name, table in opened.items():
        recorded = counted(table.sizes["step"], "row")
        console.print(f"\n[bold]{escape(name)}[/]  {recorded}", highlight=False)
        if table.sizes["step"] == 0:
            console.print("nothing recorded yet")
        else:
            loaded(reader_of(name).show)(asked.runs[name][0].answers, console)
        for step, reason in failed_rows(table).items():
            console.print(f"step {step} failed: {escape(reason)}", style="yellow", highlight=False)
    if not tables:
        for finding in findings_of(asked):
            console.print(
                f"\n[{ACCENT}]•[/] {escape(finding.sentence)} [dim]({escape(finding.basis)})[/]",
                highlight=False,
            )
