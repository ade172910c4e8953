"""The pictures of preconditioners, and the first of them: when pairs of layers pay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr

from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.block_pictures import (
    block_efficiency,
    block_step_gains,
    block_step_sizes,
)
from hessprobe.instruments.preconditioner.efficiency_pictures import (
    Runs,
    efficiency_held_out,
    efficiency_over_training,
    efficiency_own,
    missing,
    over_layerwise,
    preconditioner_scoreboard,
    update_efficiency,
)
from hessprobe.pictures.looks import Look, by_position
from hessprobe.pictures.over_runs import Series, lines_of_runs
from hessprobe.pictures.picture import Axis, Line, Lines, Picture
from hessprobe.reading.labelled import Labelled

TIMES = Axis(words="layerwise over full", scale="ratio", number=".3g")


def pictures(runs: Runs) -> list[Picture]:
    """Returns all pictures of one run, or those in which several stand beside each other."""
    on_paper: list[Callable[[Runs], Picture]] = [layerwise_over_full, over_layerwise]
    on_page: list[Callable[[Runs], Picture]] = [layerwise_over_full_steps]
    if len(runs) > 1:
        on_paper.append(update_efficiency)
    else:
        on_paper += [preconditioner_scoreboard, efficiency_over_training, block_efficiency]
        on_paper += [block_step_sizes, block_step_gains]
        on_page += [efficiency_held_out, efficiency_own]
    if all(run.answers.empty for run in runs):
        return [Lines(name=draw.__name__, missing=missing("a number")) for draw in on_paper]
    return [draw(runs) for draw in (*on_paper, *on_page)]


def layerwise_over_full(runs: Runs) -> Picture:
    """Layerwise over full Gauss-Newton by curvature batch: a colour for each damping, or for each run at its first."""

    def ask(run: Labelled[PreconditionerAnswers]) -> Series | None:
        if (pays := _pays(run.answers)) is None:
            return None
        at = pays.isel(damping=0)
        return at["curvature_sequences"].values, at["ratio"].values, at["stderr"].values

    alone = _pays(runs[0].answers) if len(runs) == 1 else None
    lines = lines_of_runs(runs, ask, "held out")
    if alone is not None:
        places = range(alone.sizes["damping"])
        lines = [line for i in places for line in _at_damping(alone.isel(damping=i), by_position(i).color)]
    return Lines(
        name="layerwise_over_full",
        lines=lines,
        x=Axis(
            words="curvature sequences",
            scale="log",
            ticks=sorted({float(size) for line in lines if not line.dots for size in line.x}),
        ),
        y=TIMES,
        legend=True,
        data=alone,
        missing=missing("layerwise_gn beside full_gn"),
    )


def layerwise_over_full_steps(runs: Runs) -> Picture:
    """The same with the largest curvature batch at each measured step."""

    def ask(run: Labelled[PreconditionerAnswers], damping: int = 0) -> Series | None:
        if (pays := _pays(run.answers)) is None:
            return None
        at = pays.isel(damping=damping, curvature_sequences=-1)
        return at["step"].values, at["per_step"].values, at["per_step_stderr"].values

    lines = lines_of_runs(runs, ask, "")
    if len(runs) == 1 and (pays := _pays(runs[0].answers)) is not None:
        dampings = enumerate(pays["damping"].values)
        each = [
            lines_of_runs(runs, partial(ask, damping=i), f"μ {mu:g}", by_position(i)) for i, mu in dampings
        ]
        lines = [line for found in each for line in found]
    several_steps = any(line.x.size > 1 for line in lines)
    return Lines(
        name="layerwise_over_full_steps",
        where="page",
        lines=lines if several_steps else [],
        y=TIMES,
        legend=True,
    )


def _pays(answers: PreconditionerAnswers) -> xr.Dataset | None:
    """Returns what is known of layerwise over full; None where no row holds the two."""
    if answers.empty or answers.pays.sizes["damping"] == 0:
        return None
    return answers.pays if np.isfinite(answers.pays["ratio"].values).any() else None


def _at_damping(each: xr.Dataset, color: str) -> list[Line]:
    """Returns the lines of one damping, held out and on the own batches, and a diamond where the first crosses 1."""
    mu, sizes = f"μ {float(each['damping']):g}", each["curvature_sequences"].values
    looks = (
        ("", "held out", Look(color=color)),
        ("own_", "own batch", Look(color=color, dash="dot", thin=True)),
    )
    lines = [
        Line(
            label=f"{mu}, {words}",
            x=sizes,
            y=each[f"{which}ratio"].values,
            stderr=each[f"{which}stderr"].values,
            look=look,
        )
        for which, words, look in looks
    ]
    at, low, high = (float(each[name]) for name in ("crossover", "crossover_low", "crossover_high"))
    if "size" in str(each["verdict"].values) and np.isfinite(at):
        lines.append(
            Line(
                label=f"{mu}, crossing",
                x=np.array([at]),
                y=np.ones(1),
                look=Look(color=color, marker="diamond", hollow=True),
                group=lines[0].label,
                dots=True,
                hover=f"crosses at {at:.3g} ({low:.3g} to {high:.3g}) sequences",
            )
        )
    return lines
