"""The page's section on training: what its template says beside the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xarray as xr

from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.instruments.train.clocks import by_clock
from hessprobe.instruments.train.pictures import held_out_losses, losses
from hessprobe.pictures import plotly_pen
from hessprobe.pictures.picture import Lines, is_empty
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import sound_rows
from hessprobe.store.attributes import decoded

Run = Labelled[TrainAnswers]


def content(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what the template takes, and as `frames` the loss along every clock that all lines have."""
    alone = len(runs) == 1
    frames = _frames(losses(runs[0]) if alone else held_out_losses(runs), runs)
    clocks = {clock: each["label"] for clock, each in frames.items()}
    return (_of_one(runs[0]) if alone else _of_several(runs)) | {"clocks": clocks, "frames": frames}


def _of_one(run: Run) -> dict[str, Any]:
    answers, asked = run.answers, _asked(run.run)
    planned = asked.get("steps")
    return {
        "summary": answers.summary,
        "planned": planned if isinstance(planned, int) else None,
        "target": _target_reached(asked, answers.table),
        "ratio": answers.ratio,
        "outcomes": answers.outcomes,
    }


def _of_several(runs: Sequence[Run]) -> dict[str, Any]:
    return {"rows": [(run.label, run.answers.summary) for run in runs if run.answers.summary is not None]}


def _frames(picture: Lines, runs: Sequence[Run]) -> dict[str, Any]:
    if is_empty(picture):
        return {}
    drawn = [run for run in runs if run.answers.rows("held_out_loss") is not None]
    curves = [sound_rows(run.answers.table, "held_out_loss") for run in drawn]
    figure = plotly_pen.draw(picture)
    return by_clock(figure, curves if len(runs) > 1 else [runs[0].answers.curve] * len(list(figure.data)))


def _target_reached(asked: dict[str, Any], table: xr.Dataset) -> float | None:
    """Returns the held-out loss at which the run was to end early, if a recorded row reached it: the run is whole."""
    target, rows = asked.get("stop_at"), sound_rows(table, "held_out_loss")
    if not isinstance(target, int | float) or not rows.sizes["step"]:
        return None
    return float(target) if float(rows["held_out_loss"].min()) <= target else None


def _asked(run: xr.DataTree | None) -> dict[str, Any]:
    """Returns the section [training] of the run's recipe; empty where there is none."""
    asked = decoded(run.attrs.get("recipe")).get("training") if run is not None else None
    return asked if isinstance(asked, dict) else {}
