"""The pictures of single layers: how well each candidate serves each, and what own step sizes would buy."""

from __future__ import annotations

import numpy as np

from hessprobe.instruments.preconditioner.efficiency_pictures import SECOND, SHARE, Runs, missing, points
from hessprobe.pictures.looks import Look
from hessprobe.pictures.picture import Axis, Dots, Heatmap, Picture


def block_efficiency(runs: Runs) -> Picture:
    """Each candidate's efficiency within each block at the last row, and what it leaves there."""
    answers = runs[0].answers
    losses = answers.losses.sel(candidate=answers.ranked)
    return Heatmap(
        name="block_efficiency",
        rows=answers.ranked,
        columns=losses["block"].values.tolist(),
        values=losses["efficiency"].values,
        value=SHARE,
        end=1.0,
        notes=[
            [f"; leaves {100 * lost:.1f} % of all layers' gain" if np.isfinite(lost) else "" for lost in row]
            for row in losses["lost"].values.tolist()
        ],
        hover="{row} in {column}<br>{value} efficient{note}",
        at=f"step {answers.last_step:,}",
        data=losses,
        missing=missing("block_efficiency"),
    )


def block_step_gains(runs: Runs) -> Picture:
    """What a step size for each block would multiply each held-out decrease by."""
    answers = runs[0].answers
    steps = answers.steps.sel(candidate=answers.ranked)
    looks = (
        ("other sequences", "together", "together", Look()),
        ("other sequences", "alone", "each layer alone", Look(hollow=True)),
        ("own batch", "together", "found on own batch", Look(color=SECOND, marker="diamond", hollow=True)),
    )
    at = [(steps.sel(found=found, known=known), words, look) for found, known, words, look in looks]
    return Dots(
        name="block_step_gains",
        rows=answers.ranked,
        points=[points(words, each["gain"], each["gain_stderr"], look) for each, words, look in at],
        x=Axis(words="times the best single step", scale="ratio", number=".3g"),
        data=steps,
        missing=missing("block_curvature_held_out"),
    )


def block_step_sizes(runs: Runs) -> Picture:
    """Each block's best step size in units of the best single one; a dot where it differs from 1 beyond errors."""
    answers = runs[0].answers
    steps = answers.steps.sel(candidate=answers.ranked)
    own = steps["own_multiplier"].values.tolist()
    return Heatmap(
        name="block_step_sizes",
        rows=answers.ranked,
        columns=steps["block"].values.tolist(),
        values=steps["multiplier"].values,
        stderr=steps["multiplier_stderr"].values,
        value=Axis(words="step over the best single step", scale="ratio", number=".3g"),
        marked=steps["resolved"].values,
        notes=[[f"{x:.3g} on the own batch" if np.isfinite(x) else "" for x in row] for row in own],
        hover="{row} in {column}<br>{value} times<br>{note}",
        data=steps,
        missing=missing("block_curvature_held_out"),
    )
