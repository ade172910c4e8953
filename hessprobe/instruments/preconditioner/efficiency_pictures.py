"""The pictures of efficiency: the scoreboard, efficiency over training, and decreases over the layerwise oracle's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.table import LAYERWISE, UPDATE
from hessprobe.pictures.looks import Look, by_position
from hessprobe.pictures.over_runs import Series, lines_of_runs, over_runs
from hessprobe.pictures.picture import Axis, Dots, Heatmap, Line, Lines, Picture, Points
from hessprobe.reading.labelled import Labelled

Runs = Sequence[Labelled[PreconditionerAnswers]]

SECOND = "second"  # the colour of what candidates make of their own batch
SHARE = Axis(words="efficiency", percent=True, from_zero=True)
TIMES = Axis(words="of layerwise's held-out decrease", scale="ratio", number=".3g")
LINES_ON_PAPER = 7  # as many as have colours of their own


def preconditioner_scoreboard(runs: Runs) -> Picture:
    """Every candidate's efficiency at the last row, on its own batch and held out."""
    answers = runs[0].answers
    looks = (("own", "own batch", Look(color=SECOND, hollow=True)), ("held_out", "held out", Look()))
    board = answers.board
    return Dots(
        name="preconditioner_scoreboard",
        rows=answers.ranked,
        points=[points(words, board[name], board[f"{name}_stderr"], look) for name, words, look in looks],
        x=SHARE,
        at=f"step {answers.last_step:,}, damping {answers.damping:g}",
        data=board,
        missing=missing("an efficiency"),
    )


def efficiency_over_training(runs: Runs, candidates: Sequence[str] | None = None) -> Picture:
    """Held-out efficiency over training, a line each.

    Args:
        runs: one.
        candidates: which; default the seven that are best at the last measured step, and the run's update.
    """
    answers = runs[0].answers
    if candidates is None:
        best = answers.ranked[:LINES_ON_PAPER]
        candidates = [*best, *({UPDATE} & set(answers.names) - set(best))]
    drawn = answers.efficiency.sel(candidate=list(candidates))
    values, errors = drawn["held_out"].values.T, drawn["held_out_stderr"].values.T
    return Lines(
        name="efficiency_over_training",
        where="paper",
        lines=[
            Line(label=name, x=drawn["step"].values, y=values[i], stderr=errors[i], look=by_position(i))
            for i, name in enumerate(candidates)
        ],
        y=Axis(words="held-out efficiency", percent=True, from_zero=True),
        data=drawn,
        missing=missing("an efficiency"),
    )


def efficiency_held_out(runs: Runs) -> Picture:
    """Held-out efficiency of every candidate at every measured step."""
    return _over_training(runs[0].answers, "held_out")


def efficiency_own(runs: Runs) -> Picture:
    """The same on the batches that candidates were built on, on one scale."""
    return _over_training(runs[0].answers, "own")


def _over_training(answers: PreconditionerAnswers, which: str) -> Picture:
    over = answers.efficiency.sel(candidate=answers.ranked)
    if over.sizes["step"] < 2:
        return Heatmap(name=f"efficiency_{which}", where="page")
    return Heatmap(
        name=f"efficiency_{which}",
        where="page",
        rows=answers.ranked,
        columns=over["step"].values,
        values=over[which].values.T,
        stderr=over[f"{which}_stderr"].values.T,
        value=SHARE,
        end=float(np.nanmax([over[name].max() for name in ("own", "held_out")])),
        x=Axis(words="step"),
        hover="{row} at step {column}<br>{value}",
    )


def update_efficiency(runs: Runs) -> Picture:
    """Held-out efficiency of the update taken, over training."""

    def ask(run: Labelled[PreconditionerAnswers]) -> Series | None:
        if run.answers.empty or UPDATE not in run.answers.names:
            return None
        over = run.answers.efficiency.sel(candidate=UPDATE)
        return over["step"].values, over["held_out"].values, over["held_out_stderr"].values

    return Lines(
        name="update_efficiency",
        lines=lines_of_runs(runs, ask, UPDATE),
        y=Axis(words="held-out efficiency of the update", percent=True),
        legend=True,
        missing=missing("an efficiency of the update"),
    )


def over_layerwise(runs: Runs) -> Picture:
    """Each candidate's held-out decrease over the layerwise oracle's: of one run by curvature batch and damping."""
    if len(runs) > 1:
        return _several_over_layerwise(runs)
    names = [name for name in runs[0].answers.ranked if name != LAYERWISE]
    ratios = runs[0].answers.over_layerwise[["ratio", "stderr"]].sel(candidate=names)
    places = ratios.transpose("candidate", "damping", "curvature_sequences")
    values, errors = (places[name].values.reshape(len(names), -1) for name in ("ratio", "stderr"))
    sizes = places["curvature_sequences"].values
    far = np.abs(np.log2(np.where(values > 0, values, 1.0))).max(initial=0.0)
    with np.errstate(invalid="ignore"):
        marked = np.abs(values - 1) > 2 * errors
    return Heatmap(
        name="over_layerwise",
        rows=names,
        columns=[f"{size} · μ {mu:g}" for mu in places["damping"].values for size in sizes],
        values=values,
        stderr=errors,
        value=TIMES,
        end=int(np.clip(np.ceil(far), 1, 5)),
        x=Axis(words="curvature sequences · damping"),
        marked=marked,
        hover="{row}, {column}<br>{value} of layerwise",
        data=ratios,
        missing=missing("a decrease beside layerwise_gn"),
    )


def _several_over_layerwise(runs: Runs) -> Picture:
    def ask(run: Labelled[PreconditionerAnswers]) -> xr.Dataset | None:
        if run.answers.empty:
            return None
        ratios = run.answers.over_layerwise.isel(damping=0, curvature_sequences=-1)
        return ratios if np.isfinite(ratios["ratio"].values).any() else None

    found = over_runs(runs, ask)
    names = list(dict.fromkeys(str(name) for _, _, ratios in found for name in ratios["candidate"].values))
    names = [name for name in names if name != LAYERWISE]
    rows = [(run.label, Look(color=look.color), each.reindex(candidate=names)) for run, look, each in found]
    return Dots(
        name="over_layerwise",
        rows=names,
        points=[points(label, each["ratio"], each["stderr"], look) for label, look, each in rows],
        x=TIMES,
        missing=missing("a decrease beside layerwise_gn"),
    )


def points(label: str, values: xr.DataArray, stderr: xr.DataArray, look: Look) -> Points:
    """Returns a number with its error for each candidate."""
    return Points(label=label, values=values.values, stderr=stderr.values, look=look)


def missing(what: str) -> str:
    """Returns the line that says what no row holds."""
    return f"no row of the table 'preconditioner' holds {what}; nothing to draw"
