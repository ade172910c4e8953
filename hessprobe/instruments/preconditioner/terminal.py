"""The table `preconditioner` in the terminal: the scoreboard of its last measured row, and when pairs of layers pay."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.reading.wording import percent, plus_minus


def show(answers: PreconditionerAnswers, console: Console) -> None:
    """Prints every candidate's efficiency at the last measured row, and layerwise over full by curvature batch."""
    if answers.empty:
        console.print("no row holds a number")
        return
    board, pays = answers.board, answers.pays
    console.print(
        f"step {answers.last_step}  {answers.size:,} curvature sequences, damping {answers.damping:g}",
        highlight=False,
    )
    shown = Table(box=None, pad_edge=False, header_style="dim", title="efficiency", title_justify="left")
    for heading in ("candidate", "held out", "own batch", "best step"):
        shown.add_column(heading, justify="left" if heading == "candidate" else "right")
    for i in range(board.sizes["candidate"]):
        at = {str(name): values.values[i] for name, values in board.data_vars.items()}
        if at["failure"]:
            shown.add_row(escape(str(board["candidate"].values[i])), "not judged", "", "")
            continue
        step = f"{float(at['best_alpha']):.3g}" if np.isfinite(at["best_alpha"]) else "-"
        pairs = (("held_out", "held_out_stderr"), ("own", "own_stderr"))
        cells = [percent(float(at[value]), float(at[error])) for value, error in pairs]
        shown.add_row(escape(str(board["candidate"].values[i])), *cells, step)
    console.print(shown)
    for i, mu in enumerate(pays["damping"].values):
        each = pays.isel(damping=i)
        numbers = [
            f"{count:,}: {plus_minus(float(ratio), float(error))}"
            for count, ratio, error in zip(
                pays["curvature_sequences"].values, each["ratio"].values, each["stderr"].values, strict=True
            )
            if np.isfinite(ratio)
        ]
        if numbers:
            said = (
                f"layerwise over full, held out, damping {mu:g}, by curvature sequences  {'  '.join(numbers)}"
            )
            console.print(said, highlight=False, markup=False)
    for name, reason in zip(board["candidate"].values, board["failure"].values, strict=True):
        if reason:
            console.print(
                f"{escape(str(name))} failed: {escape(str(reason))}", style="yellow", highlight=False
            )
