"""One picture of one run or of several: a line for each run that has something to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from hessprobe.pictures.looks import Look, by_position
from hessprobe.pictures.picture import Line
from hessprobe.reading.labelled import Labelled

Run = TypeVar("Run", bound=Labelled)
Found = TypeVar("Found")
# What a run has to draw: places, values, errors; None where it has nothing.
Series = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def over_runs(runs: Sequence[Run], ask: Callable[[Run], Found | None]) -> list[tuple[Run, Look, Found]]:
    """Returns the runs that answer, each with its look; a run keeps its look whatever the others answer."""
    answers = ((run, by_position(i), ask(run)) for i, run in enumerate(runs))
    return [(run, look, found) for run, look, found in answers if found is not None]


def lines_of_runs(
    runs: Sequence[Run], ask: Callable[[Run], Series | None], label: str, look: Look | None = None
) -> list[Line]:
    """Returns a line for each run that has something to show.

    Args:
        runs: one or several.
        ask: what is asked of each.
        label: the line's name where there is one run; of several each bears its run's.
        look: its look where there is one run; default the accent.
    """
    alone = len(runs) == 1
    return [
        Line(
            label=label if alone else run.label,
            x=x,
            y=y,
            stderr=stderr,
            look=(look or Look()) if alone else its_look,
        )
        for run, its_look, (x, y, stderr) in over_runs(runs, ask)
        if np.isfinite(y).any()
    ]
