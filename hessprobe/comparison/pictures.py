"""A comparison's pictures: loss against what was spent, bars of steps to the target, learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr

from hessprobe.comparison.compared import Comparison, spent
from hessprobe.comparison.findings import best_groups, steps_said
from hessprobe.pictures.looks import Look, by_position
from hessprobe.pictures.picture import Axis, Dots, Line, Lines, Picture, Points, is_empty

SPENT = {
    "steps": "step",
    "tokens_with_line_search": "tokens, line search included",
    "gradient_equivalents": "gradient equivalents",
}


def pictures(comparison: Comparison) -> list[Picture]:
    """Returns all pictures; that of learning rates is empty where no variant tried two that reached the target."""
    against = [loss_against(comparison, measure) for measure in SPENT]
    return [*against, steps_to_target(comparison), learning_rates(comparison)]


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes every picture that holds a number as PDF and PNG into a folder and returns the files written."""
    from hessprobe.pictures import matplotlib_pen  # matplotlib: only who asks for figures waits for it

    drawn = [picture for picture in pictures(comparison) if not is_empty(picture)]
    files = [matplotlib_pen.save(matplotlib_pen.draw(picture), folder, picture.name) for picture in drawn]
    return [path for each in files for path in each]


def loss_against(comparison: Comparison, measure: str = "steps") -> Picture:
    """Held-out loss against what was spent, a line a seed of each variant's best learning rate.

    Args:
        comparison: what to draw.
        measure: steps, tokens_with_line_search or gradient_equivalents.
    """
    lines: list[Line] = []
    drawn: list[xr.Dataset] = []
    for group, number in _numbered(comparison):
        label, look = str(group["label"].values), by_position(number)
        for member in np.flatnonzero(comparison.runs["group"].values == int(group["group"])):
            run = comparison.runs.isel(run=member)
            curve = comparison.curves[str(run["run"].values)]
            x, loss = spent(curve, measure), curve["held_out_loss"].values
            thin = Look(color=look.color, dash=look.dash, thin=True)
            lines.append(Line(label=f"{label}, seed {int(run['seed'])}", group=label, x=x, y=loss, look=thin))
            columns = {measure: ("evaluation", x), "held_out_loss": ("evaluation", loss)}
            drawn.append(xr.Dataset(columns).expand_dims(run=[str(run["run"].values)]))
    longest = max(each.sizes["evaluation"] for each in drawn)
    padded = [c.pad(evaluation=(0, longest - c.sizes["evaluation"]), constant_values=np.nan) for c in drawn]
    target = comparison.target
    return Lines(
        name=f"loss_against_{measure}",
        lines=lines,
        x=Axis(words=SPENT[measure], number=","),
        y=Axis(words="held-out loss", units="nats per token", at=target, at_words=f"target {target:.6g}"),
        legend=True,
        data=xr.concat(padded, dim="run"),
        missing="no run holds a held-out loss; nothing to draw",
    )


def steps_to_target(comparison: Comparison) -> Picture:
    """A bar a variant at its best learning rate, with the range over seeds; words where there is no number."""
    groups = best_groups(comparison)
    rows = groups.sizes["group"]
    points: list[Points] = []
    for group, number in _numbered(comparison):
        steps = group.sel(measure="steps")
        mean, least, most = (float(steps[name]) for name in ("mean", "least", "most"))
        several = int(group["seeds"]) > 1 and np.isfinite(mean)

        def here(value: float, row: int = number) -> np.ndarray:
            return np.where(np.arange(rows) == row, value, np.nan)

        points.append(
            Points(
                label=str(group["label"].values),
                values=here(np.nan_to_num(mean)),
                low=here(least) if several else None,
                high=here(most) if several else None,
                look=Look(color=by_position(number).color),
                notes=[steps_said(group)] * rows,
            )
        )
    return Dots(
        name="steps_to_target",
        rows=[str(label).replace(" at ", "\nat ", 1).replace(", ", "\n") for label in groups["label"].values],
        points=points,
        x=Axis(words=f"steps to {comparison.target:.6g} nats per token"),
        bars=True,
        hover="{row}<br>{note} steps",
        legend=False,
        data=groups,
    )


def learning_rates(comparison: Comparison) -> Picture:
    """Steps to the target against learning rate, a line for each variant that reached it at two or more."""
    sweeps = [(best, swept(comparison, int(best["variant"])), n) for best, n in _numbered(comparison)]
    sweeps = [each for each in sweeps if each[1].sizes["group"] > 1]
    return Lines(
        name="learning_rates",
        lines=[
            Line(
                label=str(best["label"].values),
                x=sweep["learning_rate"].values,
                y=sweep["mean"].sel(measure="steps").values,
                stderr=sweep["stderr"].sel(measure="steps").values,
                look=by_position(number),
                notes=[f"seeds: {seeds}" for seeds in sweep["seeds"].values.tolist()],
            )
            for best, sweep, number in sweeps
        ],
        x=Axis(words="learning rate", scale="log"),
        y=Axis(words="steps to the target", from_zero=True),
        hover="learning rate {x}: {y} steps ({note})",
        legend=True,
        data=xr.concat([sweep for _, sweep, _ in sweeps], dim="group") if sweeps else None,
        missing="no method reached the target at two learning rates; nothing to draw",
    )


def swept(comparison: Comparison, variant: int) -> xr.Dataset:
    """Returns the groups of a variant at which every seed reached the target, by learning rate."""
    groups = comparison.groups.isel(group=np.flatnonzero(comparison.groups["variant"].values == variant))
    steps, rates = groups["mean"].sel(measure="steps").values, groups["learning_rate"].values
    reached = np.flatnonzero(np.isfinite(steps) & np.isfinite(rates))
    return groups.isel(group=reached).sortby("learning_rate")


def _numbered(comparison: Comparison) -> Iterator[tuple[xr.Dataset, int]]:
    """Yields the best group of each variant in reading order, with the number that sets its look."""
    groups = best_groups(comparison)
    return ((groups.isel(group=i), i) for i in range(groups.sizes["group"]))
