"""The table `train` in the terminal: its first and last steps."""

from __future__ import annotations

from rich.console import Console

from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.pictures.terminal import first_and_last

COLUMNS = ("loss", "held_out_loss", "step_size", "gradient_norm", "tokens", "seconds")


def show(answers: TrainAnswers, console: Console) -> None:
    """Prints the first and last steps."""
    columns = [column for column in COLUMNS if column in answers.table]
    console.print(first_and_last(answers.table, columns))
