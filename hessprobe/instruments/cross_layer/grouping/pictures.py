"""Pictures of groupings: which pairs gain, how few groups are enough, which blocks matter, what knowing all buys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, ranked_gains
from hessprobe.pictures.looks import Look
from hessprobe.pictures.over_runs import Series, lines_of_runs
from hessprobe.pictures.picture import Axis, Dots, Heatmap, Line, Lines, Picture, Points
from hessprobe.reading.labelled import Labelled

Run = Labelled[CrossLayerAnswers]

# Of many pairs, the ends of the ranking.
HIGHEST, LOWEST = 12, 4
NOT_REACHED = "at no step do the sketches reach the damping; nothing to draw"


def grouping_pictures(runs: Sequence[Run]) -> list[Picture]:
    """Returns every picture of groupings: of several runs those that have a line for each."""
    if len(runs) > 1:
        return [gain_picture(runs), curve_picture(runs)]
    study = runs[0].compared.groupings
    return [merge_gains_picture(study), curve_picture(runs), importance_picture(study)]


def merge_gains_picture(study: GroupingStudy) -> Dots:
    """Returns what joining each pair of layers gains, ranked, with errors."""
    if not study.has("merge_gain"):
        return Dots(name="merge_gains", missing=study.reason or study.left_out)
    gains = ranked_gains(study, HIGHEST, LOWEST)
    resolved = gains["resolved"].values.astype(bool)
    looks = (
        (resolved, "beyond two errors", Look()),
        (~resolved, "not resolved", Look(color="second", hollow=True)),
    )
    points = [
        Points(
            label=label,
            values=np.where(chosen, gains["gain"].values, np.nan),
            stderr=gains["stderr"].values,
            look=look,
            notes=[str(reason).replace("; ", "\n") for reason in gains["reason"].values],
        )
        for chosen, label, look in looks
        if chosen.any()
    ]
    names = zip(gains["block"].values, gains["other_block"].values, strict=True)
    return Dots(
        name="merge_gains", at=_at(study), rows=[f"{one} × {other}" for one, other in names], points=points,
        x=Axis(words="gain over layerwise", percent=True, number=".2%", at=0.0), hover="{row}<br>{x}", data=gains,
    )  # fmt: skip


def curve_picture(runs: Sequence[Run]) -> Lines:
    """Returns the captured share of full's held-out decrease by number of groups."""

    def ask(run: Run) -> Series | None:
        last = run.compared.groupings.last
        if "captured" not in last:
            return None
        return last["groups"].values, last["captured"].values, last["captured_stderr"].values

    alone, study = len(runs) == 1, runs[0].compared.groupings
    return Lines(
        name="grouping_curve",
        at=_at(study) if alone and study.has("captured") else "",
        lines=_curve(study) if alone else lines_of_runs(runs, ask, ""),
        x=Axis(words="groups", reverse=True, whole=True),
        y=Axis(words="share of full's decrease", percent=True, number=".2%", at=1.0),
        hover="{x} groups: {y} of full",
        legend=True,
        missing=study.reason or study.left_out,
        data=study.last if alone and study.has("captured") else None,
    )


def _curve(study: GroupingStudy) -> list[Line]:
    """Returns one run's curve: the line, and its points by whether they can be told apart from full."""
    if not study.has("captured"):
        return []
    last = study.last
    groups, captured, errors = (last[name].values for name in ("groups", "captured", "captured_stderr"))
    apart = last["captured_resolved"].values.astype(bool)
    notes = [
        f"{over:.3f} ± {error:.3f} times layerwise\n"
        + (f"joined {joined}" if joined else "layerwise")
        + (f"\n{reason}" if reason else "").replace("; ", "\n")
        for over, error, joined, reason in zip(
            *(last[name].values for name in ("curve", "curve_stderr", "joined", "captured_reason")),
            strict=True,
        )
    ]
    looks = (
        (np.flatnonzero(apart), "beyond two errors from full", Look()),
        (np.flatnonzero(~apart), "not told apart from full", Look(hollow=True)),
    )
    return [
        Line(label="", x=groups, y=captured, markers=False, look=Look(thin=True)),
        *(
            Line(label=label, x=groups[at], y=captured[at], stderr=errors[at], look=look, dots=True,
                 notes=[notes[i] for i in at])
            for at, label, look in looks
            if at.size
        ),
    ]  # fmt: skip


def importance_picture(study: GroupingStudy) -> Heatmap:
    """Returns each block's importance at the steps studied, blank where the sketches do not reach the damping."""
    if not study.has("importance"):
        return Heatmap(name="importance", missing=study.reason or study.left_out)
    rows = study.over_training
    rows = rows[[name for name in map(str, rows) if name.startswith("importance")]]
    rows = rows.assign(importance=rows["importance"].where(rows["importance_reached"].astype(bool)))
    return Heatmap(
        name="importance", at=f"damping {study.damping:g}", rows=[str(name) for name in rows["block"].values],
        columns=rows["step"].values, values=rows["importance"].values.T, stderr=rows["importance_stderr"].values.T,
        marked=rows["importance_resolved"].values.astype(bool).T, signed=True, x=Axis(words="step"),
        value=Axis(words="lost when cut off", percent=True, number=".2%"), hover="{row} at step {column}<br>{value}",
        missing=NOT_REACHED, data=rows,
    )  # fmt: skip


def gain_picture(runs: Sequence[Run]) -> Lines:
    """Returns full's held-out decrease over that of layerwise over training, where the sketches reach the damping."""

    def ask(run: Run) -> Series | None:
        study = run.compared.groupings
        if study.reason:
            return None
        rows = study.over_training
        rows = rows.isel(step=np.flatnonzero(rows["full_over_layerwise_reached"].values))
        return (
            rows["step"].values,
            rows["full_over_layerwise"].values,
            rows["full_over_layerwise_stderr"].values,
        )

    words = "full over layerwise"
    return Lines(
        name="gain",
        lines=lines_of_runs(runs, ask, words),
        y=Axis(words=words),
        legend=True,
        missing=NOT_REACHED,
    )


def _at(study: GroupingStudy) -> str:
    return f"step {int(study.last['step']):,}, damping {study.damping:g}"
