"""The page's section on training: losses along any clock, step sizes, predicted and real decrease."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.instruments.train.pictures import CLOCKS, loss, pictures
from hessprobe.pictures import plotly_pen
from hessprobe.pictures.room import drawn_points
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import failed_rows
from hessprobe.report.differences import Beside
from hessprobe.report.provenance import decoded

NO_ROWS = xr.Dataset(coords={"step": np.empty(0, int)})
# Clock -> what the page calls it, and how the hover text says a place on it.
WORDS = {
    "step": ("steps", ""),
    "tokens": ("tokens", ", %{x:,.0f} tokens"),
    "seconds": ("seconds", ", %{x:,.1f} s"),
    "gradient_equivalents": ("gradients", ", %{x:,.0f} gradients"),
}


def content(runs: Sequence[Labelled[TrainAnswers]]) -> dict[str, Any]:
    """Returns what the section's template needs of one run or several, and the page's script; empty without a loss.

    `frames`: {clock: its label, its axis's title, the words said at a place, and the places of every line of the chart
    of losses}, of the clocks that every line has at each of its points; the steps themselves come first.
    """
    known = [(run.label, run.answers.summary) for run in runs if run.answers.summary is not None]
    if not known:
        return {}
    frames = _frames(runs)
    shared = {"clocks": {clock: each["label"] for clock, each in frames.items()}, "frames": frames}
    if len(runs) != 1:
        return {"rows": known, **shared}
    answers = runs[0].answers
    return {
        "summary": answers.summary,
        "planned": answers.planned,
        "target": answers.target,
        "ratio": answers.decrease_ratio,
        "outcomes": answers.step_outcomes,
        **shared,
    }


def _frames(runs: Sequence[Labelled[TrainAnswers]]) -> dict[str, Any]:
    over_steps = [line.y for line in loss(runs).lines]
    frames = {}
    for clock, (label, words) in WORDS.items() if over_steps else ():
        lines = loss(runs, clock).lines
        if [line.y.size for line in lines] == [y.size for y in over_steps]:
            places = [_whole(line.x[drawn_points(line.y)]).tolist() for line in lines]
            frames[clock] = {"label": label, "title": CLOCKS[clock], "words": words, "x": places}
    return frames


def _whole(values: np.ndarray) -> np.ndarray:
    # What counts whole things needs no ".0" ten thousand times over.
    return values.astype(int) if (values == np.round(values)).all() else values


# Until the report asks instruments through their registry.
def training(run: xr.DataTree) -> Section:
    table, reason = table_or_reason(run, "train")
    if table is None:
        return Section(name="training", title="Training", template="", missing=reason)
    asked = decoded(run.attrs.get("recipe")).get("training")
    answers = TrainAnswers(table, asked if isinstance(asked, dict) else None)
    runs = [Labelled(label="", answers=answers, compared=answers)]
    found = content(runs)
    return Section(
        name="training",
        title="Training",
        template="train/section.html.j2",
        missing="" if found else "No step of the table 'train' holds a loss yet.",
        content=found,
        charts=plotly_pen.charts(pictures(runs)) if found else {},
        frames=found.get("frames", {}),
        failed=failed_rows(table),
    )


# Until the report asks instruments through their registry.
def several_training(beside: Sequence[Beside]) -> Section:
    runs = []
    for run in beside:
        answers = TrainAnswers(run.tree["train"].to_dataset() if "train" in run.tree.children else NO_ROWS)
        runs.append(Labelled(label=run.label, answers=answers, compared=answers))
    found = content(runs)
    said = dict(found.get("rows", ()))
    missing = [f"{run.label} holds no recorded step of training." for run in beside if run.label not in said]
    return Section(
        name="training",
        title="Training",
        template="train/several.html.j2",
        missing="" if found else " ".join(missing),
        content={**found, "missing": missing},
        charts=plotly_pen.charts(pictures(runs)) if found else {},
        frames=found.get("frames", {}),
    )


# Until the report asks instruments through their registry.
def training_drawings(run: xr.DataTree) -> dict[str, Any]:
    from hessprobe.pictures import matplotlib_pen

    answers = TrainAnswers(run["train"].to_dataset() if "train" in run.children else NO_ROWS)
    runs = [Labelled(label="", answers=answers, compared=answers)]
    return {
        picture.name: lambda picture=picture: (matplotlib_pen.draw(picture), picture.data)
        for picture in pictures(runs)
    }
