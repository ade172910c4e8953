"""The pictures of any table: a line for each scalar, labels against steps for each vector, the last row of each matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from hessprobe.instruments.generic.answers import Stored, StoredScalars
from hessprobe.pictures.over_runs import Series, lines_of_runs
from hessprobe.pictures.picture import Axis, Heatmap, Lines, Picture
from hessprobe.reading.labelled import Labelled

Run = Labelled[StoredScalars]


def lines_and_heatmaps(runs: Sequence[Run]) -> list[Picture]:
    """Returns all pictures of a table, of one run or several."""
    names = dict.fromkeys(name for run in runs for name in run.answers.scalars)
    return [
        *(_line(name, runs) for name in names),
        *(_over_steps(each, name, title) for name, title, each in _each(runs, "vectors")),
        *(_last_row(each, name, title) for name, title, each in _each(runs, "matrices")),
    ]


def _line(name: str, runs: Sequence[Run]) -> Lines:
    stored = next(run.answers.scalars[name] for run in runs if name in run.answers.scalars)

    def ask(run: Run) -> Series | None:
        found = run.answers.scalars.get(name)
        if found is None:
            return None
        return found.steps, found.values.values, None if found.stderr is None else found.stderr.values

    return Lines(
        name=_file(runs, name),
        title=stored.words,
        lines=lines_of_runs(runs, ask, stored.words),
        y=Axis(words=name.replace("_", " "), units=stored.units),
        legend=len(runs) > 1,
        data=stored.values,
    )


def _each(runs: Sequence[Run], kind: str) -> list[tuple[str, str, Stored]]:
    """Returns the name and title of a picture for every quantity of every run, and the quantity."""
    alone = len(runs) == 1
    return [
        (
            _file(runs, name if alone else f"{name}-{i}"),
            each.words if alone else f"{each.words}, {run.label}",
            each,
        )
        for i, run in enumerate(runs)
        for name, each in getattr(run.answers, kind).items()
    ]


def _over_steps(stored: Stored, name: str, title: str) -> Heatmap:
    return Heatmap(
        name=name,
        title=title,
        rows=_labels(stored, 1),
        columns=stored.steps,
        values=stored.values.values.T,
        stderr=None if stored.stderr is None else stored.stderr.values.T,
        signed=bool((stored.values.values < 0).any()),
        x=Axis(words="step"),
        value=Axis(words=stored.name.replace("_", " "), units=stored.units),
        hover="{row} at step {column}<br>{value}",
        data=stored.values,
    )


def _last_row(stored: Stored, name: str, title: str) -> Heatmap:
    rows, columns = _labels(stored, 1), _labels(stored, 2)
    return Heatmap(
        name=name,
        title=title,
        rows=rows,
        columns=columns,
        values=stored.values.values[-1],
        stderr=None if stored.stderr is None else stored.stderr.values[-1],
        signed=bool((stored.values.values[-1] < 0).any()),
        value=Axis(words=stored.name.replace("_", " "), units=stored.units),
        square=rows == columns,
        at=f"step {int(stored.steps[-1]):,}",
        data=stored.values.isel(step=-1),
    )


def _labels(stored: Stored, dim: int) -> list[str]:
    return [str(label) for label in np.ravel(stored.values[stored.values.dims[dim]].values)]


def _file(runs: Sequence[Run], name: str) -> str:
    """Returns a picture's name, which is a file's too, whatever a variable is called."""
    return re.sub(r"[^\w-]", "_", f"{runs[0].answers.name}_{name}")
